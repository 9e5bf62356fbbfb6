"""Networks, rewards, objective, optimizer and the jitted step of a config, put together.

Nothing is on a device here. `train` places and runs a program; `plan` only compiles it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from r0_jax.method import lora, optim, train_state
from r0_jax.method.generator import Generator
from r0_jax.method.objective import Objective
from r0_jax.method.train_state import TrainState
from r0_jax.method.train_step import TrainStep, make_term_norms, make_train_step
from r0_jax.models import attention_backend, repeat
from r0_jax.parallel import sharding
from r0_jax.pipelines import tiny_decoder
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.source import PromptSource
from r0_jax.rewards.reward import Reward
from r0_jax.weights.network import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a config trains.

    Attributes:
      frozen: what is never trained, as the objective takes it, with `Lazy` leaves.
      source: the prompts that `step` trains on.
    """

    config: ConfigDict
    mesh: Mesh
    pipeline: Pipeline
    generator: Generator
    objective: Objective
    optimizer: optax.GradientTransformation
    frozen: dict[str, Any]
    source: PromptSource

    def changed(self, *, config: ConfigDict | None = None, mesh: Mesh | None = None) -> "Program":
        """Return the same networks and rewards by another config or on another mesh."""
        return build(
            config or self.config,
            mesh or self.mesh,
            self.pipeline,
            self.objective.rewards,
            self.source,
        )

    def init(self, base: Params) -> TrainState:
        """Return the state before the first step."""
        shapes = self.pipeline.networks[self.pipeline.generator_part].shapes
        params = self.generator.init(jax.random.key(self.config.seed), base, shapes)
        spread_of = (
            [r.name for r in self.objective.rewards]
            if self.config.objective.normalization == "running_std"
            else []
        )
        fake = self.objective.fake
        if not fake:
            return train_state.init(params, self.optimizer, spread_of)
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        started = fake.init(key, base, shapes)
        return train_state.init(params, self.optimizer, spread_of, started)

    @functools.cached_property
    def frozen_sharding(self) -> dict[str, Any]:
        """The sharding of each leaf of `frozen`."""

        def of(params: Params, heads: Mapping[str, int] | None = None) -> dict[str, NamedSharding]:
            shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
            return sharding.param_sharding(shapes, self.mesh, self.config.sharding, heads)

        heads = {part: network.heads for part, network in self.pipeline.networks.items()}
        heads["base"] = heads[self.pipeline.generator_part]
        networks = {
            part: of(params, heads.get(part))
            for part, params in self.frozen.items()
            if part not in ("rewards", "empty")
        }
        return networks | {
            "rewards": {name: of(params) for name, params in self.frozen["rewards"].items()},
            "empty": dict.fromkeys(self.frozen["empty"], sharding.replicated(self.mesh)),
        }

    @functools.cached_property
    def abstract_frozen(self) -> dict[str, Any]:
        """Shapes of `frozen`, with their sharding."""
        return sharding.with_sharding(self.frozen, self.frozen_sharding)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes of the state, with their sharding: optimizer and EMA follow their parameter."""
        shapes = jax.eval_shape(self.init, self.abstract_frozen["base"])
        heads = self.pipeline.networks[self.pipeline.generator_part].heads
        return sharding.with_sharding(
            shapes, sharding_of_state(shapes, self.mesh, self.config.sharding, heads)
        )

    @functools.cached_property
    def state_sharding(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    @functools.cached_property
    def abstract(self) -> tuple[TrainState, dict[str, Any], dict[str, Any], Any]:
        """Shapes of what `step` takes, with their sharding."""
        split, whole = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
        columns = self.source.columns(self.pipeline, self.objective.rewards)
        batch = {
            name: jax.ShapeDtypeStruct((self.config.batch_size, *shape), dtype, sharding=split)
            for name, (shape, dtype) in columns.items()
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        return (
            self.abstract_state,
            self.abstract_frozen,
            batch,
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        )

    @functools.cached_property
    def step(self):
        """(state, frozen, batch, key) -> (state, metrics), jitted; the state is donated."""
        return jax.jit(
            step_on(self.mesh, self.objective, self.optimizer, self.config),
            out_shardings=(self.state_sharding, sharding.replicated(self.mesh)),
            donate_argnums=0,
        )

    @functools.cached_property
    def term_norms(self):
        """(state, frozen, batch, key) -> the gradient norm of each term alone, jitted."""
        count = sharding.microbatches(self.config.batch_size, self.config.device_batch, self.mesh)
        split = sharding.microbatch_sharding(self.mesh)
        return jax.jit(
            make_term_norms(self.objective, count, split),
            out_shardings=sharding.replicated(self.mesh),
        )


def sharding_of_state(
    shapes: TrainState,
    mesh: Mesh,
    rules: Sequence[object],
    heads: Mapping[str, int] | None = None,
) -> TrainState:
    """Return the sharding of a state of shapes; `rules` and `heads` as in `param_sharding`.

    The fake score's adapters have the names of the generator's, and shapes of their own.
    """
    found = sharding.follow_params(shapes, shapes.params, mesh, rules, heads)
    if not shapes.fake:
        return found
    of_fake = sharding.follow_params(shapes.fake, shapes.fake.params, mesh, rules, heads)
    return found._replace(fake=of_fake)


def step_on(
    mesh: Mesh,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
) -> TrainStep:
    """Return the pure step on a mesh.

    Its microbatches hold `config.device_batch` samples a device.
    """
    count = sharding.microbatches(config.batch_size, config.device_batch, mesh)
    split = sharding.microbatch_sharding(mesh)
    return make_train_step(objective, optimizer, config, count, split)


def build(
    config: ConfigDict,
    mesh: Mesh,
    pipeline: Pipeline,
    rewards: Sequence[Reward],
    source: PromptSource,
) -> Program:
    """Return the program of a config, with a pipeline and rewards that are loaded.

    Raises InputError for a tiny decoder or adapters that do not fit the pipeline.
    """
    pipeline = pipeline.attending(attention_backend.of_config(config, mesh))
    decoder = (
        tiny_decoder.load(config.objective.decoder, pipeline, config.dtype)
        if config.objective.decoder
        else None
    )
    part = pipeline.generator_part
    if config.lora.rank:
        lora.check_rank(pipeline.networks[part].shapes, config.lora.targets, config.lora.rank)
    if (score := config.regularizers.score).weight:
        layers = score.targets or config.lora.targets
        shapes = pipeline.networks[part].shapes
        lora.check_rank(shapes, layers, score.rank, "regularizers.score")
    generator = Generator(
        config.lora.rank, config.lora.alpha, config.lora.targets, config.dtype, pipeline.fixed
    )
    parts: dict[str, Any] = {"base": pipeline.params[part]}
    parts |= {name: params for name, params in pipeline.params.items() if name != part}
    if decoder:
        parts["decoder"] = decoder.params
    frozen = parts | {
        "rewards": {reward.name: reward.scoring_params for reward in rewards},
        "empty": pipeline.empty,
    }
    blocks = repeat.of_config(config, mesh)
    objective = Objective(pipeline, generator, rewards, config, decoder, blocks)
    return Program(
        config,
        mesh,
        pipeline,
        generator,
        objective,
        optim.make_optimizer(config, config.regularizers.langevin.weight),
        frozen,
        source,
    )
