"""Faults of images: blur, noise, faded colours, bent outlines and morphed shapes.

Each sample has its own level in [0, 1].
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, ArrayLike, Float, Int, Key

from r0_jax.shapes.scene import Layout, Scene, paint, signed_distance

_RADIUS = 4  # of the blur's window, pixels; covers its widest Gaussian
BLUR, NOISE, FADE = 2.0, 0.25, 0.7  # at level 1: sigma in pixels, standard deviation, share
WARP = 1.8  # at level 1: standard deviation of a pixel's displacement
_BENDS = 10  # bends of a warp per side: a small object gets about one


def blur(images: Float[Array, "b h w c"], sigma: Float[Array, " b"]) -> Float[Array, "b h w c"]:
    """Blur each sample by a Gaussian of its own `sigma` in pixels; 0 changes nothing."""
    offsets = jnp.arange(-_RADIUS, _RADIUS + 1)
    window = jnp.exp(-0.5 * (offsets[None] / jnp.maximum(sigma, 1e-3)[:, None]) ** 2)
    window = window / jnp.sum(window, axis=1, keepdims=True)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (_RADIUS, _RADIUS)
        padded = jnp.pad(images, pad, mode="edge")
        images = sum(
            window[:, i, None, None, None]
            * jax.lax.slice_in_dim(padded, i, i + images.shape[axis], axis=axis)
            for i in range(2 * _RADIUS + 1)
        )
    return images


def degrade(
    key: Key[Array, ""], images: Float[Array, "b h w 3"], level: Float[Array, " b"]
) -> Float[Array, "b h w 3"]:
    """Apply a random mixture of blur, noise and fading to grey; the strengths sum to `level`."""
    mix_key, noise_key = jax.random.split(key)
    # Dirichlet(1/2, 1/2, 1/2), without the rejection loop of jax.random.dirichlet.
    squares = jax.random.normal(mix_key, (len(images), 3)) ** 2
    mix = squares / jnp.sum(squares, axis=1, keepdims=True) * level[:, None]
    images = blur(images, BLUR * mix[:, 0])
    noise = jax.random.normal(noise_key, images.shape)
    images = images + NOISE * mix[:, 1, None, None, None] * noise
    grey = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    images = images + FADE * mix[:, 2, None, None, None] * (grey - images)
    return jnp.clip(images, 0.0, 1.0)


def warp(
    key: Key[Array, ""], images: Float[Array, "b h w c"], level: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Bend outlines at random, as few denoising steps do: round corners, dented circles."""
    batch, height, width, _ = images.shape
    coarse = jax.random.normal(key, (batch, _BENDS, _BENDS, 2))
    shift = jax.image.resize(coarse, (batch, height, width, 2), "cubic")
    shift = WARP * level[:, None, None, None] * shift
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    places = jnp.moveaxis(shift, -1, 1) + jnp.stack([rows, columns])[None]  # [B, 2, H, W]

    def bend(channel, place):
        return map_coordinates(channel, list(place), order=1, mode="nearest")

    return jax.vmap(jax.vmap(bend, (-1, None), -1))(images, places)


def morph(
    scenes: Scene, layouts: Layout, towards: Int[ArrayLike, "b 2"], level: Float[Array, " b"]
) -> Float[Array, "b 64 64 3"]:
    """Render scenes with each outline moved the share `level` towards the shape `towards`.

    Both shapes have the same radius. The result is, for example, neither square nor circle.
    """
    start, end = (
        signed_distance(shape, layouts.centre, layouts.radius, jnp)
        for shape in (scenes.shape, towards)
    )
    return paint(scenes, layouts, start + level[:, None, None, None] * (end - start), jnp)
