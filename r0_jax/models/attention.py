"""The one attention function, and diffusers' Attention and FeedForward modules."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from r0_jax.models.attention_backend import attend
from r0_jax.models.linear import Linear


def dot_product_attention(
    query: Float[Array, "b t c"],
    key: Float[Array, "b s d"],
    value: Float[Array, "b s d"],
    heads: int,
    *,
    bias: Float[Array, "#b h t s"] | None = None,
    mask: Bool[Array, "b s"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Float[Array, "b t c"]:
    """Return softmax(q k^T / sqrt(c / heads) + bias) v over `heads` heads; softmax in float32.

    `mask` is False at keys that nothing attends to; `scale` replaces 1 / sqrt(c / heads).
    The network's backend computes it (attention_backend.py).
    """
    query, key, value = (split_heads(x, heads) for x in (query, key, value))
    return join_heads(
        attend(query, key, value, bias=bias, mask=mask, scale=scale, is_causal=is_causal)
    )


def split_heads(x: Float[Array, "b t c"], heads: int) -> Float[Array, "b t n d"]:
    """Return [B, T, heads, C / heads]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def join_heads(x: Float[Array, "b t n d"]) -> Float[Array, "b t c"]:
    """Undo `split_heads`."""
    return x.reshape(*x.shape[:2], -1)


class Placeholder(nnx.Module):
    """Keep an index of a list free, where the file has a dropout: so names equal the file's."""


class Attention(nnx.Module):
    """Mirror diffusers' `models/attention_processor.py::Attention`, self or cross."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        cross_attention_dim: int | None = None,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        context = cross_attention_dim or channels
        self.heads = heads
        self.to_q = Linear(channels, channels, use_bias=qkv_bias, rngs=rngs)
        self.to_k = Linear(context, channels, use_bias=qkv_bias, rngs=rngs)
        self.to_v = Linear(context, channels, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs), Placeholder()])

    def __call__(
        self, x: Float[Array, "b t c"], context: Float[Array, "b s d"] | None = None
    ) -> Float[Array, "b t c"]:
        context = x if context is None else context
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](dot_product_attention(query, key, value, self.heads))


class GEGLU(nnx.Module):
    """Apply a gated linear unit with the exact (erf) GELU."""

    def __init__(self, channels: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = Linear(channels, 2 * inner, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b inner"]:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)
        return x * jax.nn.gelu(gate, approximate=False)


class GELU(nnx.Module):
    """Apply a linear layer and GELU's tanh approximation."""

    def __init__(self, channels: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = Linear(channels, inner, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b inner"]:
        return jax.nn.gelu(self.proj(x), approximate=True)


class FeedForward(nnx.Module):
    """Widen four times, apply a GEGLU unless told otherwise, and come back to the width."""

    def __init__(
        self, channels: int, *, activation: type[GEGLU] | type[GELU] = GEGLU, rngs: nnx.Rngs
    ):
        inner = 4 * channels
        self.net = nnx.List(
            [
                activation(channels, inner, rngs=rngs),
                Placeholder(),
                Linear(inner, channels, rngs=rngs),
            ]
        )

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return self.net[2](self.net[0](x))
