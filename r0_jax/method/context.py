"""The values that a penalty can use."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r0_jax.diffusion import noise_schedule, rollout
from r0_jax.diffusion.schedulers import Scheduler


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """Hold one microbatch after the rollout.

    Attributes:
      trajectory: the graded call of the generator.
      keys: one random key a sample.
      base: (latents, timesteps) -> the frozen base's network output under the prompts.
      base_pair: (latents, timesteps) -> the same under the prompts and under the empty prompt, in
        one call of the network.
      base_features: (latents, timesteps) -> the base's mid-block features.
      squared_distance: () -> ||theta - theta_pretrained||^2.
      table: every timestep that the base was trained on, in the form of a sampler. Its index is
        a noise level, from the noisiest one down.
    """

    trajectory: rollout.Trajectory
    keys: rollout.Keys
    base: Callable[[jax.Array, jax.Array], jax.Array]
    base_pair: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    base_features: Callable[[jax.Array, jax.Array], jax.Array]
    squared_distance: Callable[[], jax.Array]
    table: Scheduler

    @functools.cached_property
    def base_x0(self) -> Float[Array, "b h w c"]:
        """Return the base's one-shot clean prediction at the generator's own noisy input."""
        at = self.trajectory
        model_output = self.base(at.latents, at.timesteps)
        return jax.lax.stop_gradient(
            noise_schedule.x0_and_epsilon(
                self.table.prediction_type, model_output, at.latents, at.alpha, at.sigma
            )[0]
        )

    def renoise(
        self, x0: Float[Array, "b h w c"], level: tuple[float, float], tag: int
    ) -> "Noised":
        """Return x0 with noise of a random level for each sample.

        `level` is the least and the most of it, from 0 to 1 as a share of the trained timesteps.
        """
        steps = len(self.table.timesteps)
        share = level[0] + (level[1] - level[0]) * rollout.uniform(self.keys, tag)
        # The table runs from the noisiest timestep down.
        index = jnp.clip((1 - share) * steps, 0, steps - 1).astype(jnp.int32)
        alpha, sigma = (
            jnp.asarray(x)[index][:, None, None, None]
            for x in (self.table.alphas, self.table.sigmas)
        )
        noise = rollout.normal(self.keys, tag + 1, x0.shape[1:])
        timesteps = jnp.asarray(self.table.timesteps, jnp.float32)[index]
        return Noised(alpha * x0 + sigma * noise, timesteps, alpha, sigma)


@dataclasses.dataclass(frozen=True)
class Noised:
    """Hold latents = alpha x0 + sigma noise, at `timesteps` [B]."""

    latents: jax.Array
    timesteps: jax.Array
    alpha: jax.Array
    sigma: jax.Array
