"""Embeddings of the timestep (diffusers `models/embeddings.py`), and tables of embeddings."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models.linear import Linear


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
        self.linear_1 = Linear(channels, time_embed_dim, rngs=rngs)
        if cond_proj_dim is not None:
            self.cond_proj = Linear(cond_proj_dim, channels, use_bias=False, rngs=rngs)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim, rngs=rngs)

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
