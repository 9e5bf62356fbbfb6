"""The method on one page: from what the generator draws to the loss and its metrics.

    trajectory = the few-step sampler run from noise            R0: all K steps, R0+: a random one
    images     = decode(trajectory.x0)
    g          = weighted sum of the rewards' image gradients, each normalized, per sample
    loss       = - <stop_gradient(g), images> + sum_j lambda_j penalty_j

One backward pass carries g through decoder and generator, however many rewards there are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.diffusion import grid, rollout
from r0_jax.method.context import Context
from r0_jax.method.generator import Generator
from r0_jax.method.regularizers import PENALTIES
from r0_jax.method.reward_gradient import reward_gradient
from r0_jax.models import repeat
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.pipelines.tiny_decoder import TinyDecoder
from r0_jax.rewards.reward import Reward
from r0_jax.weights.network import Params

# Tags of the random draws of one sample.
_NOISE, _ROLLOUT, _REGULARIZERS = range(3)

Metrics = dict[str, Float[Array, ""]]
SQUARE = "square/"  # metrics of squared scores; the train step uses and removes them


class Objective:
    """Compute the loss that one gradient step descends.

    `frozen` holds what is never trained. It is an argument and never a constant of the program:
    "base" (the pretrained network), the pipeline's other parts ("vae", "text_encoder", ...),
    "rewards" ({name: params}) and "empty" (`Pipeline.empty`). Where a tiny decoder replaces the
    VAE, it is "decoder".
    """

    def __init__(
        self,
        pipeline: Pipeline,
        generator: Generator,
        rewards: Sequence[Reward],
        config: ConfigDict,
        decoder: TinyDecoder | None = None,
        gathered: Sharding | None = None,
    ):
        self.pipeline, self.generator, self.rewards = pipeline, generator, rewards
        self.config, self.decoder = config, decoder
        self.num_steps = config.sampler.num_steps
        self.grid = grid.grid(pipeline.scheduler_config, self.num_steps)
        self.table = grid.noise_levels(pipeline.scheduler_config)
        self.repeat = repeat.Repeat(config.scan_blocks, config.remat == "blocks", gathered)
        self.grad_steps = 1 if config.objective.method == "r0plus" else config.objective.grad_steps

    def draw_last(self, key: jax.Array) -> jax.Array | int:
        """Return the step whose prediction is rewarded: the last one, or for R0+ a random one.

        All samples of a batch share it, so that only the steps up to it run.
        """
        if self.config.objective.method == "r0plus":
            return jax.random.randint(key, (), 0, self.num_steps)
        return self.num_steps - 1

    def loss(
        self,
        params: Params,
        frozen: dict[str, Any],
        batch: dict[str, jax.Array],
        keys: rollout.Keys,
        last: jax.Array | int,
        spreads: dict[str, jax.Array],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss and the metrics, all of them means over the batch's samples.

        Args:
          batch: the columns of `Pipeline.tokenize` ("input_ids" [B, T], ...) or `Pipeline.embeds`,
            and `Reward.column` [B, D] for rewards that read prompts.
          keys: one a sample.
          last: the step whose prediction is rewarded, by `draw_last`.
          spreads: of each reward's scores, for objective.normalization = "running_std".
        """
        with repeat.use(self.repeat):
            return self._loss(params, frozen, batch, keys, last, spreads)

    def _loss(self, params, frozen, batch, keys, last, spreads):
        rolled, drawn = (
            jax.vmap(jax.random.fold_in, (0, None))(keys, tag) for tag in (_ROLLOUT, _REGULARIZERS)
        )
        conditioning = self.pipeline.encode_prompt(frozen, batch)
        trajectory = self._rollout(params, frozen, conditioning, keys, rolled, last)

        images = (
            self.decoder.decode_unclipped(frozen["decoder"], trajectory.x0)
            if self.decoder
            else self.pipeline.decode_unclipped(frozen["vae"], trajectory.x0)
        )
        gradient = reward_gradient(
            self.rewards,
            frozen["rewards"],
            lax.stop_gradient(images),
            {r.name: batch[r.column] for r in self.rewards if r.column in batch},
            drawn,
            spreads,
            self.config,
        )
        loss = -jnp.mean(jnp.sum(gradient.images * images, axis=(1, 2, 3)))
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

        context = self._context(params, frozen, conditioning, trajectory, drawn)
        for name, penalty in PENALTIES.items():
            options = self.config.regularizers[name]
            if options.weight:  # at 0 the penalty is not even traced
                value = penalty(context, options)
                metrics[f"penalty/{name}"] = value
                loss = loss + options.weight * value
        return loss, metrics

    def _rollout(self, params, frozen, conditioning, keys, rolled, last) -> rollout.Trajectory:
        def denoiser(weights: Params) -> rollout.Denoise:
            return lambda latents, timesteps: self.pipeline.denoise(
                weights, latents, timesteps, conditioning
            )

        weights = self.generator.weights(params, frozen["base"])
        return rollout.rollout(
            denoiser(weights),
            denoiser(lax.stop_gradient(weights)),
            self.grid,
            rollout.normal(keys, _NOISE, self.pipeline.latent_shape),
            rolled,
            last=last,
            grad_steps=self.grad_steps,
            random_eta=self.config.sampler.random_eta,
            eta=self.config.sampler.eta,
            unroll=self.config.objective.unroll,
            remat=self.config.remat == "calls",
        )

    def _context(self, params, frozen, conditioning, trajectory, keys) -> Context:
        def base(latents, timesteps):
            return self.pipeline.denoise(frozen["base"], latents, timesteps, conditioning)

        def base_pair(latents, timesteps):
            empty = self.pipeline.encode_negative(frozen, frozen["empty"], conditioning)
            output = self.pipeline.denoise(
                frozen["base"],
                *jax.tree.map(both, (latents, timesteps), (latents, timesteps)),
                jax.tree.map(both, conditioning, empty),
            )
            return output[0::2], output[1::2]

        def both(a, b):  # alternating, so that each device keeps its own samples
            return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

        def base_features(latents, timesteps):
            return self.pipeline.features(frozen["base"], latents, timesteps, conditioning)

        return Context(
            trajectory,
            keys,
            base,
            base_pair,
            base_features,
            lambda: self.generator.squared_distance(params, frozen["base"]),
            self.table,
        )
