"""The generator: the pretrained network, unrolled over a fixed grid of K timesteps.

    x_next = alpha_next x0 + sigma_next (sqrt(1 - eta^2) eps + eta n),     n ~ N(0, I)

eta = 0 is DDIM; eta = 1 takes fresh noise only, as LCM does. The last step ends at sigma = 0, so
it returns x0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from r0_jax.diffusion.schedulers import Index, Scheduler

# (latents, timesteps [B]) -> the network's output. The function knows the prompt and parameters.
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
# One key a sample: then a draw does not depend on the split over devices or microbatches.
Keys = Key[Array, " b"]


class Trajectory(NamedTuple):
    """The last network call of a rollout: what the objective looks at."""

    latents: Float[Array, "b h w c"]  # the noisy input of the call
    timesteps: Float[Array, " b"]
    alpha: Float[Array, ""]  # of the input: latents = alpha x0 + sigma eps
    sigma: Float[Array, ""]
    x0: Float[Array, "b h w c"]  # the clean prediction: the image that is rewarded


def normal(keys: Keys, tag: int | Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Return standard normal noise [B, *shape], independent for each sample and tag."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, tag), shape))(keys)


def uniform(keys: Keys, tag: int | Int[Array, ""]) -> Float[Array, " b"]:
    """Return U[0, 1) numbers [B], independent for each sample and tag."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, tag)))(keys)


def step(
    grid: Scheduler,
    model_output: Float[Array, "b h w c"],
    latents: Float[Array, "b h w c"],
    i: Index,
    eta: Float[Array, " b"],
    noise: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Return the next latents and the clean prediction x0, in float32."""
    x0, epsilon = grid.x0_and_epsilon(model_output, latents, i)
    eta = eta[:, None, None, None]
    epsilon = jnp.sqrt(1 - eta**2) * epsilon + eta * noise
    return jnp.asarray(grid.next_alphas)[i] * x0 + jnp.asarray(grid.next_sigmas)[i] * epsilon, x0


def rollout(
    denoise: Denoise,
    denoise_frozen: Denoise,
    grid: Scheduler,
    noise: Float[Array, "b h w c"],
    keys: Keys,
    *,
    last: Index,
    grad_steps: int,
    random_eta: bool,
    eta: float,
    unroll: bool = False,
    remat: bool = True,
) -> Trajectory:
    """Run steps 0 to `last` of the grid; gradients flow through the last `grad_steps` of them.

    R0 takes last = K - 1 and grad_steps = K. R0+ takes a random `last` and grad_steps = 1. Steps
    after `last` are not run.

    Args:
      denoise_frozen: the same network; no gradient reaches its parameters.
      last: may be traced; at least grad_steps - 1.
      random_eta: draw eta ~ U[0, 1] for each step of each sample; otherwise all take `eta`.
      unroll: write the steps with gradient one after the other, not as a loop. The numbers are the
        same; it is faster on CPU.
      remat: compute each step with gradient again in the backward pass. Memory then holds one
        network evaluation and K latents.
    """
    batch, *shape = noise.shape
    eta_keys, noise_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, tag) for tag in (0, 1))

    def advance(
        denoise: Denoise, latents: Float[Array, "b h w c"], i: Index
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        timesteps = jnp.full(batch, jnp.asarray(grid.timesteps, jnp.float32)[i])
        model_output = denoise(grid.scale_model_input(latents, i), timesteps)
        etas = uniform(eta_keys, i) if random_eta else jnp.full(batch, eta, jnp.float32)
        return step(grid, model_output, latents, i, etas, normal(noise_keys, i, tuple(shape)))

    first = last + 1 - grad_steps
    latents = lax.fori_loop(
        0,
        first,
        lambda i, x: advance(denoise_frozen, x, i)[0],
        lax.stop_gradient(noise * grid.init_noise_sigma),
    )

    def graded(
        latents: Float[Array, "b h w c"], i: Index
    ) -> tuple[Float[Array, "b h w c"], tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]]:
        after, x0 = advance(denoise, latents, i)
        return after, (latents, x0)

    _, (inputs, predictions) = lax.scan(
        jax.checkpoint(graded) if remat else graded,
        lax.stop_gradient(latents),
        first + jnp.arange(grad_steps),
        unroll=unroll,
    )
    return Trajectory(
        inputs[-1],
        jnp.full(batch, jnp.asarray(grid.timesteps, jnp.float32)[last]),
        jnp.asarray(grid.alphas)[last],
        jnp.asarray(grid.sigmas)[last],
        predictions[-1],
    )
