"""The fake score: the base with adapters of its own, which learn to denoise what is drawn.

Where the generator's images are unlike the base's, the fake's predictions differ from the base's.
`directions.score` pulls along that difference. There is no third network: generator, fake and base
share the frozen weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.diffusion import noise_schedule
from r0_jax.method import optim
from r0_jax.method.context import Context
from r0_jax.method.generator import Generator
from r0_jax.method.train_state import FakeState
from r0_jax.weights.network import Params, Shapes

_FAKE = 500  # tag of its random draws; those of directions.py are smaller


@dataclasses.dataclass(frozen=True, eq=False)
class FakeScore:
    """How the fake is made and trained.

    Attributes:
      network: adapters to network weights.
      updates: of the fake for each one of the generator.
    """

    network: Generator
    optimizer: optax.GradientTransformation
    updates: int

    def init(self, key: jax.Array, base: Params, shapes: Shapes) -> FakeState:
        """Return the state with which the fake equals the base."""
        params = self.network.init(key, base, shapes)
        return FakeState(params, self.optimizer.init(params))

    def update(self, state: FakeState, grads: Params) -> FakeState:
        """Return the state after one update."""
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        return FakeState(optax.apply_updates(state.params, updates), opt_state)


def of_config(config: ConfigDict) -> FakeScore | None:
    """Return the fake score of a config; None where regularizers.score has no weight.

    Its optimizer is config.optimizer with another learning rate and b1. A step of the schedule is
    one of the generator, whatever `updates` are.
    """
    options = config.regularizers.score
    if not options.weight:
        return None
    targets = options.targets or config.lora.targets
    own = config.copy_and_resolve_references()
    own.optimizer.learning_rate = options.learning_rate_ratio * config.optimizer.learning_rate
    own.optimizer.b1 = options.b1
    return FakeScore(
        Generator(options.rank, float(options.rank), targets, config.dtype),
        optim.make_optimizer(own, updates=options.updates),
        options.updates,
    )


def denoising_loss(context: Context) -> Float[Array, " b"]:
    """Return the mean squared error of the fake's output on x0, noised to any level, by sample.

    R0+ takes no level below `context.floor`, as `directions.score` does.
    """
    noised = context.renoise(context.x0, (0.0, 1.0), _FAKE)
    output = context.fake(noised.latents, noised.timesteps)
    wanted = noise_schedule.model_output(
        context.table.prediction_type, context.x0, noised.noise, noised.alpha, noised.sigma
    )
    return jnp.mean((output - wanted) ** 2, axis=(1, 2, 3))
