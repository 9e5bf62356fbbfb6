"""The generator: the pretrained network, unrolled over a fixed grid of K timesteps.

    x_next = alpha_next x0 + sigma_next (sqrt(1 - eta^2) eps + eta n),     n ~ N(0, I)

eta = 0 is DDIM; eta = 1 takes fresh noise only, as LCM does. The last step ends at sigma = 0, so
it returns x0.
"""

import functools
import math
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _bounded(latents: Float[Array, "b h w c"], bound: float) -> Float[Array, "b h w c"]:
    """Return the latents; of a sample's gradient with respect to them keep at most norm `bound`."""
    del bound
    return latents


def _keep(latents: Float[Array, "b h w c"], bound: float) -> tuple[Float[Array, "b h w c"], None]:
    return _bounded(latents, bound), None


def _scale_down(bound: float, _: None, gradient: Float[Array, "b h w c"]) -> tuple[jax.Array]:
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=(1, 2, 3), keepdims=True))
    return (gradient * jnp.minimum(1.0, bound / jnp.maximum(norm, 1e-30)),)


_bounded.defvjp(_keep, _scale_down)


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
    bound: float = math.inf,
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
      bound: of a sample's gradient, at most this norm flows from a step to the one before.
    """
    moves = _Moves(grid, keys, random_eta, eta, noise.shape)
    first = last + 1 - grad_steps
    latents = lax.fori_loop(
        0,
        first,
        lambda i, x: moves.advance(denoise_frozen, x, i)[0],
        lax.stop_gradient(noise * grid.init_noise_sigma),
    )

    def graded(
        latents: Float[Array, "b h w c"], i: Index
    ) -> tuple[Float[Array, "b h w c"], tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]]:
        kept = latents if math.isinf(bound) else _bounded(latents, bound)
        after, x0 = moves.advance(denoise, kept, i)
        return after, (latents, x0)

    _, (inputs, predictions) = lax.scan(
        jax.checkpoint(graded) if remat else graded,
        lax.stop_gradient(latents),
        first + jnp.arange(grad_steps),
        unroll=unroll,
    )
    return moves.trajectory(inputs[-1], predictions[-1], last)


def rollout_by_outputs(
    denoise: Denoise,
    denoise_frozen: Denoise,
    grid: Scheduler,
    noise: Float[Array, "b h w c"],
    keys: Keys,
    *,
    last: Index,
    graded: Int[Array, " n"],
    random_eta: bool,
    eta: float,
    unroll: bool = False,
    remat: bool = True,
) -> Trajectory:
    """Run steps 0 to `last`; gradients flow through the network's outputs at the `graded` steps.

    They do not flow through its inputs (DRTune, arXiv 2405.00760). So x0 depends on each of these
    outputs by a factor, which the grid knows. Memory holds one network evaluation and n latents,
    however many steps there are.

    Args:
      graded: numbers of different steps, none of them after `last`.
      others: as in `rollout`.
    """
    moves = _Moves(grid, keys, random_eta, eta, noise.shape)
    count = len(graded)

    def note(
        carry: tuple[jax.Array, ...], latents: Float[Array, "b h w c"], i: Index, which: int
    ) -> tuple[jax.Array, ...]:
        """Keep the input of a graded step; take the factors to what follows step i."""
        inputs, factors = carry
        is_now = (graded == i)[:, None, None, None, None]
        by_latents, by_output = (pair[which][None] for pair in moves.factors(i))
        return (
            jnp.where(is_now, latents[None], inputs),
            factors * by_latents + jnp.where(is_now, by_output, 0.0),
        )

    def ungraded(i: Index, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        latents, *kept = carry
        after, _ = moves.advance(denoise_frozen, latents, i)
        return after, *note(tuple(kept), latents, i, _NEXT)

    latents = lax.stop_gradient(noise * grid.init_noise_sigma)
    none = (
        jnp.zeros((count, *noise.shape), jnp.float32),
        jnp.zeros((count, len(noise), 1, 1, 1), jnp.float32),
    )
    latents, *kept = lax.fori_loop(0, last, ungraded, (latents, *none))
    inputs, factors = note(tuple(kept), latents, last, _X0)
    inputs, factors, x0 = lax.stop_gradient(
        (inputs, factors, moves.advance(denoise_frozen, latents, last)[1])
    )

    def add(x0: Float[Array, "b h w c"], k: Index) -> tuple[Float[Array, "b h w c"], None]:
        output = moves.output(denoise, inputs[k], graded[k])
        return x0 + factors[k] * (output - lax.stop_gradient(output)), None

    x0, _ = lax.scan(jax.checkpoint(add) if remat else add, x0, jnp.arange(count), unroll=unroll)
    return moves.trajectory(latents, x0, last)


def noised_anew(
    denoise: Denoise, grid: Scheduler, trajectory: Trajectory, keys: Keys, i: Index, count: int
) -> Trajectory:
    """Return a trajectory whose call i is also made again, `count` times a sample (DRaFT-LV).

    Each time the x0 of that call is under fresh noise. No gradient flows to it, only through the
    new calls, which are one of `denoise`. The predictions of a sample follow each other, so that
    there are b (1 + count).
    """
    batch, *shape = trajectory.x0.shape
    noise = jnp.stack([normal(keys, j, tuple(shape)) for j in range(count)], axis=1)
    x0 = lax.stop_gradient(trajectory.x0)[:, None]
    latents = (trajectory.alpha * x0 + trajectory.sigma * noise).reshape(-1, *shape)
    timesteps = jnp.repeat(trajectory.timesteps, count)
    output = denoise(grid.scale_model_input(latents, i), timesteps)
    again = Trajectory(
        latents,
        timesteps,
        trajectory.alpha,
        trajectory.sigma,
        grid.x0_and_epsilon(output, latents, i)[0],
    )

    def beside(one: jax.Array, more: jax.Array) -> jax.Array:
        if not one.ndim:
            return one
        parts = one[:, None], more.reshape(batch, count, *one.shape[1:])
        return jnp.concatenate(parts, axis=1).reshape(-1, *one.shape[1:])

    return jax.tree.map(beside, trajectory, again)


_NEXT, _X0 = range(2)  # what `step` returns


class _Moves(NamedTuple):
    """The steps of one rollout, with their random draws."""

    grid: Scheduler
    keys: Keys
    random_eta: bool
    eta: float
    shape: tuple[int, ...]  # of the latents, [b, h, w, c]

    def advance(
        self, denoise: Denoise, latents: Float[Array, "b h w c"], i: Index
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Return the latents after step i, and its x0."""
        noise = normal(self._keys(1), i, self.shape[1:])
        output = self.output(denoise, latents, i)
        return step(self.grid, output, latents, i, self._etas(i), noise)

    def output(
        self, denoise: Denoise, latents: Float[Array, "b h w c"], i: Index
    ) -> Float[Array, "b h w c"]:
        """Return the network's output at step i."""
        return denoise(self.grid.scale_model_input(latents, i), self._timesteps(i))

    def factors(self, i: Index) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Return what step i returns per latents, and per output: ([b, 1, 1, 1], ...) each.

        A step is linear in both, with equal factors at all elements.
        """
        etas = self._etas(i)
        one = jnp.ones((self.shape[0], 1, 1, 1), jnp.float32)
        zero = jnp.zeros_like(one)
        return (
            step(self.grid, zero, one, i, etas, zero),
            step(self.grid, one, zero, i, etas, zero),
        )

    def trajectory(
        self, latents: Float[Array, "b h w c"], x0: Float[Array, "b h w c"], last: Index
    ) -> Trajectory:
        """Return the trajectory whose last call took these latents."""
        return Trajectory(
            latents,
            self._timesteps(last),
            jnp.asarray(self.grid.alphas)[last],
            jnp.asarray(self.grid.sigmas)[last],
            x0,
        )

    def _timesteps(self, i: Index) -> Float[Array, " b"]:
        return jnp.full(self.shape[0], jnp.asarray(self.grid.timesteps, jnp.float32)[i])

    def _etas(self, i: Index) -> Float[Array, " b"]:
        if self.random_eta:
            return uniform(self._keys(0), i)
        return jnp.full(self.shape[0], self.eta, jnp.float32)

    def _keys(self, tag: int) -> Keys:
        return jax.vmap(jax.random.fold_in, (0, None))(self.keys, tag)
