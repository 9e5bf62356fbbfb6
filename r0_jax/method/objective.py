"""The method on one page: what the generator draws is pulled at x0, by rewards and by terms.

    trajectory = the sampler run from noise         R0: all K steps, R0+: a random one (reward_step)
    image      = decode(x0)
    g          = weighted sum of the rewards' image gradients, each normalized by sample
    pull       = unit(g d image / d x0) + sum_j weight_j direction_j           [B, h, w, c]
    loss       = - <stop_gradient(pull), x0>

Rewards and terms meet at x0 in one unit, so a weight is a share of the rewards' pull. It means the
same for every resolution, number of channels and VAE. One backward pass carries the sum through the
generator, however many rewards and terms there are.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.diffusion import grid, noise_schedule, rollout
from r0_jax.method import fake_score, optim, reward_step
from r0_jax.method.context import Context
from r0_jax.method.directions import Direction, norm, unit
from r0_jax.method.generator import Generator
from r0_jax.method.regularizers import DIRECTIONS
from r0_jax.method.reward_gradient import reward_gradient
from r0_jax.method.reward_step import Drawn
from r0_jax.method.train_state import TrainState
from r0_jax.models import repeat
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.pipelines.tiny_decoder import TinyDecoder
from r0_jax.rewards.reward import Reward
from r0_jax.weights.network import Params

# Tags of the random draws of one sample.
_NOISE, _ROLLOUT, _REGULARIZERS, _FAKE, _NOISED = range(5)

Metrics = dict[str, Float[Array, ""]]
SQUARE = "square/"  # metrics of squared scores; the train step uses and removes them


class Objective:
    """Compute the loss that one gradient step descends.

    `frozen` holds what is never trained. It is an argument and never a constant of the program:
    "base" (the pretrained network), the pipeline's other parts ("vae", "text_encoder", ...),
    "rewards" ({name: params}) and "empty" (`Pipeline.empty`). Where a tiny decoder replaces the
    VAE, it is "decoder". The train step adds what `read` names.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        generator: Generator,
        rewards: Sequence[Reward],
        config: ConfigDict,
        decoder: TinyDecoder | None = None,
        blocks: repeat.Repeat = repeat.PLAIN,
    ):
        self.pipeline, self.generator, self.rewards = pipeline, generator, rewards
        self.config, self.decoder = config, decoder
        self.fake = fake_score.of_config(config)
        self.grid = grid.grid(
            pipeline.scheduler_config, config.sampler.num_steps, config.sampler.eta
        )
        self.table = grid.noise_levels(pipeline.scheduler_config)
        # Of each step of the grid: |d x0 / d network output|, and the level that it ends at as a
        # share of the trained timesteps. They weigh R0+'s random step.
        self.gains = noise_schedule.x0_gain(
            self.grid.prediction_type, self.grid.alphas, self.grid.sigmas
        )
        self.floors = grid.levels_after(self.grid, self.table)
        self.repeat = blocks

    def draw(self, key: jax.Array) -> Drawn:
        """Return what a training step rewards."""
        return reward_step.draw(self.config, key)

    def read(self, state: TrainState) -> dict[str, Any]:
        """Return what the loss reads of a state beside its parameters: a part of `frozen`."""
        options = self.config.regularizers.consistency
        found = {}
        if options.weight and options.target == "ema":
            found["ema"] = state.ema_params
        if self.fake:
            found["fake"] = state.fake.params
        return found

    def loss(
        self,
        params: Params,
        frozen: dict[str, Any],
        batch: dict[str, jax.Array],
        keys: rollout.Keys,
        drawn: Drawn,
        spreads: dict[str, jax.Array],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss and the metrics, all of them means over the batch's samples.

        Where there is a fake score, its own loss adds its gradient in frozen["fake"], and 0.

        Args:
          batch: the columns of `Pipeline.tokenize` ("input_ids" [B, T], ...) or `Pipeline.embeds`,
            and `Reward.column` [B, D] for rewards that read prompts.
          keys: one a sample.
          drawn: what is rewarded, by `draw`.
          spreads: of each reward's scores, for objective.normalization = "running_std".
        """
        with repeat.use(self.repeat):
            return self._loss(params, frozen, batch, keys, drawn, spreads)

    def _loss(self, params, frozen, batch, keys, drawn, spreads):
        conditioning = self.pipeline.encode_prompt(frozen, batch)
        trajectory = self._rollout(params, frozen, conditioning, keys, drawn)
        conditioning, batch, keys = self._rewarded(conditioning, batch, keys)
        still = lax.stop_gradient(trajectory)
        pulls, metrics = self._pulls(
            params, frozen, conditioning, batch, keys, still, drawn, spreads
        )
        pull = self._weighed(sum(pulls.values(), start=jnp.zeros_like(still.x0)), drawn)
        loss = -jnp.mean(jnp.sum(lax.stop_gradient(pull) * trajectory.x0, axis=(1, 2, 3)))
        if self.fake:
            own = self._fake_loss(params, frozen, conditioning, still, keys, drawn)
            loss += own - lax.stop_gradient(own)
            metrics["train/fake_loss"] = own
        return loss, metrics

    def fake_loss(
        self,
        fake: Params,
        params: Params,
        frozen: dict[str, Any],
        batch: dict[str, jax.Array],
        keys: rollout.Keys,
        drawn: Drawn,
    ) -> Float[Array, ""]:
        """Return the loss of the fake score's adapters on what the generator draws.

        The other arguments are those of `loss`; they get no gradient.
        """
        with repeat.use(self.repeat):
            frozen = frozen | {"fake": fake}
            conditioning = self.pipeline.encode_prompt(frozen, batch)
            params = lax.stop_gradient(params)
            still = lax.stop_gradient(self._rollout(params, frozen, conditioning, keys, drawn))
            conditioning, batch, keys = self._rewarded(conditioning, batch, keys)
            return self._fake_loss(params, frozen, conditioning, still, keys, drawn)

    def _fake_loss(self, params, frozen, conditioning, trajectory, keys, drawn):
        own = _fold(keys, _FAKE)
        context = self._context(params, frozen, conditioning, trajectory, own, drawn)
        return jnp.mean(fake_score.denoising_loss(context))

    def term_norms(
        self,
        params: Params,
        frozen: dict[str, Any],
        batch: dict[str, jax.Array],
        keys: rollout.Keys,
        drawn: Drawn,
        spreads: dict[str, jax.Array],
    ) -> Metrics:
        """Return "norm/params/TERM": the norm of the loss's gradient by each term alone.

        The arguments are those of `loss`. Every term costs a backward pass of the generator, one
        after the other.
        """

        def x0(params: Params) -> tuple[Direction, rollout.Trajectory]:
            trajectory = self._rollout(params, frozen, conditioning, keys, drawn)
            return trajectory.x0, trajectory

        with repeat.use(self.repeat):
            conditioning = self.pipeline.encode_prompt(frozen, batch)
            _, pull_back, trajectory = jax.vjp(x0, params, has_aux=True)
            still = lax.stop_gradient(trajectory)
            around = self._rewarded(conditioning, batch, keys)
            pulls = self._pulls(params, frozen, *around, still, drawn, spreads)[0]
            each = [self._weighed(pull, drawn) / len(pull) for pull in pulls.values()]

            def norm_of(pull: Direction) -> Float[Array, ""]:
                return optim.global_norm(pull_back(pull))

            # A loop holds the memory of one pass; where loops are slow there are small networks.
            unrolled = self.config.objective.unroll
            norms = list(map(norm_of, each)) if unrolled else lax.map(norm_of, jnp.stack(each))
        return {f"norm/params/{name}": norms[i] for i, name in enumerate(pulls)}

    def _weighed(self, pull: Direction, drawn: Drawn) -> Direction:
        """Undo, for R0+, that x0 moves more per change of the network at noisier steps."""
        if self.config.objective.method == "r0plus":
            return pull / jnp.asarray(self.gains)[drawn.last]
        return pull

    def _pulls(
        self, params, frozen, conditioning, batch, keys, trajectory, drawn, spreads
    ) -> tuple[dict[str, Direction], Metrics]:
        """Return what pulls at x0, by term and with its weight, and metrics."""
        keys = _fold(keys, _REGULARIZERS)
        if self.fake:  # which learns from its own loss alone
            frozen = frozen | {"fake": lax.stop_gradient(frozen["fake"])}
        pulls, metrics = {}, {}
        if self.rewards:
            pulls["rewards"], metrics = self._rewards_pull(
                frozen, batch, trajectory.x0, keys, spreads
            )
        context = self._context(params, frozen, conditioning, trajectory, keys, drawn)
        for name, direction in DIRECTIONS.items():
            options = self.config.regularizers[name]
            if options.weight:  # at 0 the term is not even traced
                pulls[name] = options.weight * direction(context, options)
        metrics |= {f"norm/x0/{name}": jnp.mean(norm(pull)) for name, pull in pulls.items()}
        metrics |= {
            f"cosine/x0/rewards~{name}": jnp.mean(
                jnp.sum(unit(pulls["rewards"]) * unit(pull), axis=(1, 2, 3))
            )
            for name, pull in pulls.items()
            if "rewards" in pulls and name != "rewards"
        }
        return pulls, metrics

    def _rewards_pull(self, frozen, batch, x0, keys, spreads) -> tuple[Direction, Metrics]:
        """Return the rewards' image gradient pulled back to x0, of norm 1, and metrics."""
        images, pull_back = jax.vjp(functools.partial(self._decode, frozen), x0)
        gradient = reward_gradient(
            self.rewards,
            frozen["rewards"],
            images,
            {r.name: batch[r.column] for r in self.rewards if r.column in batch},
            keys,
            spreads,
            self.config,
        )
        (pull,) = pull_back(gradient.images)
        metrics = {f"reward/{name}": jnp.mean(x) for name, x in gradient.scores.items()}
        metrics |= {
            f"{SQUARE}{name}": jnp.mean(x**2)
            for name, x in gradient.scores.items()
            if name in spreads
        }
        metrics |= {f"norm/reward_grads/{name}": jnp.mean(x) for name, x in gradient.norms.items()}
        metrics |= {
            f"cosine/reward_grads/{pair}": jnp.mean(x) for pair, x in gradient.cosines.items()
        }
        return unit(pull), metrics

    def _decode(self, frozen, x0: Direction) -> Float[Array, "b H W 3"]:
        if self.decoder:
            return self.decoder.decode_unclipped(frozen["decoder"], x0)
        return self.pipeline.decode_unclipped(frozen["vae"], x0)

    def _rollout(self, params, frozen, conditioning, keys, drawn) -> rollout.Trajectory:
        """Return the trajectory; with `noises` a sample has predictions one after the other."""
        weights = self.generator.weights(params, frozen["base"])
        still = lax.stop_gradient(weights)
        options = self.config.objective
        arguments = (
            self._denoiser(weights, frozen, conditioning),
            self._denoiser(still, frozen, conditioning),
            self.grid,
            rollout.normal(keys, _NOISE, self.pipeline.latent_shape),
            _fold(keys, _ROLLOUT),
        )
        fields = {
            "last": drawn.last,
            "random_eta": self.config.sampler.random_eta,
            "eta": self.config.sampler.eta,
            "unroll": options.unroll,
            "remat": self.config.remat == "calls",
        }
        if drawn.graded is not None:
            return rollout.rollout_by_outputs(*arguments, graded=drawn.graded, **fields)
        grad_steps = 1 if reward_step.is_random(self.config) else options.grad_steps
        # The loss is a mean over the samples, and so is what it sends back to each of them.
        bound = (options.bound or math.inf) / len(keys)
        found = rollout.rollout(*arguments, grad_steps=grad_steps, bound=bound, **fields)
        if not options.noises:
            return found
        repeated = jax.tree.map(lambda x: jnp.repeat(x, options.noises, axis=0), conditioning)
        denoise = self._denoiser(weights, frozen, repeated)
        again = _fold(keys, _NOISED)
        return rollout.noised_anew(denoise, self.grid, found, again, drawn.last, options.noises)

    def _rewarded(self, conditioning, batch, keys):
        """Return these of each prediction that `_rollout` returns."""
        if not (noises := self.config.objective.noises):
            return conditioning, batch, keys
        count = 1 + noises
        conditioning, batch = jax.tree.map(
            lambda x: jnp.repeat(x, count, axis=0), (conditioning, batch)
        )
        each = jax.vmap(jax.random.fold_in)(
            jnp.repeat(keys, count), jnp.tile(jnp.arange(count), len(keys))
        )
        return conditioning, batch, each

    def _denoiser(self, weights: Params, frozen, conditioning) -> rollout.Denoise:
        """Return the network as the sampler calls it, with its guidance."""
        if self.config.sampler.guidance_scale == 1:
            return lambda latents, timesteps: self.pipeline.denoise(
                weights, latents, timesteps, conditioning
            )
        pair = self._pair(weights, frozen, conditioning)

        def guided(latents, timesteps):
            prompted, empty = pair(latents, timesteps)
            return empty + self.config.sampler.guidance_scale * (prompted - empty)

        return guided

    def _pair(self, weights: Params, frozen, conditioning):
        """Return a function to the network's outputs with the prompts and without, in one call."""

        def pair(latents, timesteps):
            empty = self.pipeline.encode_negative(frozen, frozen["empty"], conditioning)
            output = self.pipeline.denoise(
                weights,
                *jax.tree.map(both, (latents, timesteps), (latents, timesteps)),
                jax.tree.map(both, conditioning, empty),
            )
            return output[0::2], output[1::2]

        def both(a, b):  # alternating, so that each device keeps its own samples
            return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

        return pair

    def _context(self, params, frozen, conditioning, trajectory, keys, drawn) -> Context:
        def base(latents, timesteps):
            return self.pipeline.denoise(frozen["base"], latents, timesteps, conditioning)

        def base_features(latents, timesteps):
            return self.pipeline.features(frozen["base"], latents, timesteps, conditioning)

        def target(latents, timesteps):
            of_target = lax.stop_gradient(frozen.get("ema", params))
            weights = self.generator.weights(of_target, frozen["base"])
            return self.pipeline.denoise(weights, latents, timesteps, conditioning)

        def fake(latents, timesteps):
            weights = self.fake.network.weights(frozen["fake"], frozen["base"])
            return self.pipeline.denoise(weights, latents, timesteps, conditioning)

        return Context(
            trajectory,
            keys,
            base,
            self._pair(frozen["base"], frozen, conditioning),
            base_features,
            target,
            self.table,
            jnp.asarray(self.floors)[drawn.last] if reward_step.is_random(self.config) else 0.0,
            fake if self.fake else None,
        )


def _fold(keys: rollout.Keys, tag: int) -> rollout.Keys:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, tag)
