"""Hold what a regularizer may look at."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r0_jax.diffusion import noise_schedule, rollout
from r0_jax.diffusion.schedulers import Scheduler


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One microbatch after the rollout, without a gradient.

    Attributes:
      trajectory: the graded call of the generator.
      keys: one random key a sample.
      base: (latents, timesteps) -> the frozen base's network output under the prompts.
      base_pair: (latents, timesteps) -> the same under the prompts and under the empty prompt, in
        one call of the network.
      base_features: (latents, timesteps) -> its mid-block features.
      target: (latents, timesteps) -> the output under the prompts of the generator, or of its
        average over the steps. No gradient reaches it.
      table: every timestep that the base was trained on, as a sampler whose index i is a noise
        level: clean to noisy conversions at any of them.
      fake: (latents, timesteps) -> the fake score's output under the prompts, where there is one.
      floor: the lowest level to which x0 is noised, a share of the trained timesteps.
    """

    trajectory: rollout.Trajectory
    keys: rollout.Keys
    base: Callable[[jax.Array, jax.Array], jax.Array]
    base_pair: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    base_features: Callable[[jax.Array, jax.Array], jax.Array]
    target: Callable[[jax.Array, jax.Array], jax.Array]
    table: Scheduler
    floor: float | jax.Array = 0.0
    fake: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    @property
    def x0(self) -> Float[Array, "b h w c"]:
        """Return the clean prediction of the graded call."""
        return self.trajectory.x0

    @functools.cached_property
    def base_x0(self) -> Float[Array, "b h w c"]:
        """Return the base's one-shot clean prediction at the generator's own noisy input."""
        return self.clean(self.base, self.trajectory)

    def guided_x0(self, scale: float | Float[Array, "b 1 1 1"]) -> Float[Array, "b h w c"]:
        """Return the same under classifier-free guidance: x0_empty + scale (x0 - x0_empty)."""
        prompted, empty = self.clean_pair(self.trajectory)
        return empty + scale * (prompted - empty)

    def clean(
        self,
        network: Callable[[jax.Array, jax.Array], jax.Array],
        at: "rollout.Trajectory | Noised",
    ) -> Float[Array, "b h w c"]:
        """Return the clean prediction of a network, e.g. of `base` or `target`."""
        return self._clean(network(at.latents, at.timesteps), at)

    def clean_pair(self, at: "rollout.Trajectory | Noised") -> tuple[jax.Array, jax.Array]:
        """Return the base's clean predictions with and without the prompt."""
        prompted, empty = self.base_pair(at.latents, at.timesteps)
        return self._clean(prompted, at), self._clean(empty, at)

    def renoise(
        self, x0: Float[Array, "b h w c"], level: tuple[float, float], tag: int
    ) -> "Noised":
        """Noise x0 to a random level of each sample.

        `level` is (least, most) as shares of the trained timesteps; both are raised to `floor`.
        """
        steps = len(self.table.timesteps)
        least, most = (jnp.maximum(bound, self.floor) for bound in level)
        share = least + (most - least) * rollout.uniform(self.keys, tag)
        # The table runs from the noisiest timestep down.
        index = jnp.clip((1 - share) * steps, 0, steps - 1).astype(jnp.int32)
        alpha, sigma = (
            jnp.asarray(x)[index][:, None, None, None]
            for x in (self.table.alphas, self.table.sigmas)
        )
        noise = rollout.normal(self.keys, tag + 1, x0.shape[1:])
        timesteps = jnp.asarray(self.table.timesteps, jnp.float32)[index]
        return Noised(alpha * x0 + sigma * noise, timesteps, alpha, sigma, noise)

    def toward(self, x0: Float[Array, "b h w c"], skip: float) -> tuple["Noised", Bool[Array, ""]]:
        """Take one step of DDIM, or of Euler, from the generator's noisy input to a clean x0.

        It ends `skip` lower, a share of the trained timesteps, but not below the lowest of them.
        Returns where it ends, and whether that is the lowest.
        """
        at, steps = self.trajectory, len(self.table.timesteps)
        # The table runs from the noisiest timestep down.
        here = jnp.sum(jnp.asarray(self.table.sigmas) > at.sigma + 1e-6)
        index = jnp.minimum(here + max(1, round(skip * steps)), steps - 1)
        noise = (at.latents - at.alpha * x0) / at.sigma
        alpha, sigma = (jnp.asarray(x)[index] for x in (self.table.alphas, self.table.sigmas))
        timestep = jnp.asarray(self.table.timesteps, jnp.float32)[index]
        latents = alpha * x0 + sigma * noise
        timesteps = jnp.full(len(latents), timestep)
        return Noised(latents, timesteps, alpha, sigma, noise), index == steps - 1

    def _clean(self, model_output: jax.Array, at: "rollout.Trajectory | Noised") -> jax.Array:
        kind = self.table.prediction_type
        return noise_schedule.x0_and_epsilon(kind, model_output, at.latents, at.alpha, at.sigma)[0]


@dataclasses.dataclass(frozen=True)
class Noised:
    """Hold latents = alpha x0 + sigma noise, at `timesteps` [B]."""

    latents: jax.Array
    timesteps: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    noise: jax.Array
