"""Embeddings of timesteps (diffusers `models/embeddings.py`), positions of tokens, and tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


def sinusoidal(
    timesteps: Float[Array, " b"], channels: int, *, flip_sin_to_cos: bool, freq_shift: int | float
) -> Float[Array, "b c"]:
    """Return sines and cosines of timesteps (0 to 1000) at geometric frequencies, float32."""
    half = channels // 2
    exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, channels % 2)))


class TimestepEmbedding(nnx.Module):
    """Apply two linear layers with a SiLU between them; first add a projected condition."""

    def __init__(
        self,
        channels: int,
        time_embed_dim: int,
        *,
        cond_proj_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.linear_1 = nnx.Linear(channels, time_embed_dim, rngs=rngs)
        if cond_proj_dim is not None:
            self.cond_proj = nnx.Linear(cond_proj_dim, channels, use_bias=False, rngs=rngs)
        self.linear_2 = nnx.Linear(time_embed_dim, time_embed_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b c"], condition: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b t"]:
        # The sinusoids are float32; the network computes in the dtype of its weights.
        x = x.astype(self.linear_1.kernel.get_value().dtype)
        if condition is not None:
            x = x + self.cond_proj(condition.astype(x.dtype))
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def embed(count: int, width: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """Return a table of `count` embeddings that is read in its own dtype."""
    table = nnx.Embed(count, width, rngs=rngs)
    table.dtype = None  # flax would keep the float32 of construction
    return table


def rotary_frequencies(channels: int, theta: float) -> Float[np.ndarray, " half"]:
    """Return the angles, in radians, by which a position turns each pair of `channels`."""
    return theta ** -(np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels))


def rotary(
    x: Float[Array, "b t c"],
    angles: Float[np.ndarray, "t half"] | Float[Array, "t half"],
    heads: int,
) -> Float[Array, "b t c"]:
    """Turn the pairs (i, i + half) of each head's channels by `angles`, in float32 (RoPE)."""
    first, second = jnp.split(x.reshape(*x.shape[:2], heads, -1).astype(jnp.float32), 2, axis=-1)
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).reshape(x.shape).astype(x.dtype)
