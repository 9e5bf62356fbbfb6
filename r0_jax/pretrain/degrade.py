"""Ways for an image to be bad, by a level in [0, 1] a sample: blur, noise, washed-out colours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_RADIUS = 4  # of the blur's window, pixels; covers its widest Gaussian
BLUR, NOISE, FADE = 2.0, 0.25, 0.7  # at level 1: sigma in pixels, standard deviation, share


def blur(images: Float[Array, "b h w c"], sigma: Float[Array, " b"]) -> Float[Array, "b h w c"]:
    """Gaussian blur of `sigma` pixels, its own for each sample; 0 leaves the image as it is."""
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
            for i in range(2 * _RADIUS + 1))
    return images


def degrade(key: Key[Array, ""], images: Float[Array, "b h w 3"], level: Float[Array, " b"]
            ) -> Float[Array, "b h w 3"]:
    """A random mixture of blur, noise and fading towards grey whose strengths add up to `level`."""
    mix_key, noise_key = jax.random.split(key)
    mix = jax.random.dirichlet(mix_key, jnp.full(3, 0.5), (len(images),)) * level[:, None]
    images = blur(images, BLUR * mix[:, 0])
    noise = jax.random.normal(noise_key, images.shape)
    images = images + NOISE * mix[:, 1, None, None, None] * noise
    grey = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    images = images + FADE * mix[:, 2, None, None, None] * (grey - images)
    return jnp.clip(images, 0.0, 1.0)
