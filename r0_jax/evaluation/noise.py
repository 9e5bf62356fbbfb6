"""The noise that images are drawn from, fixed by a seed and the number of the image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from r0_jax.diffusion import rollout

_NOISE, _STEPS = range(2)  # tags of the random draws of one image


@functools.partial(jax.jit, static_argnames="shape")
def draw_noise(
    key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]
) -> tuple[Float[Array, "b h w c"], rollout.Keys]:
    """Return standard normal noise [B, *shape] and one key an image for what its steps draw.

    Both depend on `key` and an image's index alone, not on the batch.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _STEPS)
    return rollout.normal(keys, _NOISE, shape), step_keys


def fixed_noise(
    seed: int, rows: int | range, shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "n h w c"], rollout.Keys]:
    """Return the noise [N, *shape], on the host, and the keys of images `rows`, or of the first."""
    rows = range(rows) if isinstance(rows, int) else rows
    noise, keys = draw_noise(jax.random.key(seed), jnp.asarray(rows), shape)
    return np.asarray(noise), keys
