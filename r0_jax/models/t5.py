"""The encoder of T5, v1.1 and the original: transformers `models/t5/modeling_t5.py`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import dot_product_attention
from r0_jax.models.embeddings import embed
from r0_jax.models.linear import Linear
from r0_jax.models.repeat import repeat

# Other types have other biases (umt5: one table a layer); those of a decoder look back only.
_ONLY = {"model_type": ("t5",), "is_decoder": (False,)}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Mirror the fields and defaults of transformers' `T5Config`."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "T5Config":
        """Parse a published `config.json`; raise InputError for what is not supported."""
        config = configs.parse_transformers(cls, fields, only=_ONLY)
        # A direction has half of the buckets, and half of those are for single distances.
        configs.check_least(config, 4, "relative_attention_num_buckets")
        configs.check_least(
            config,
            config.relative_attention_num_buckets // 4 + 1,
            "relative_attention_max_distance",
        )
        if config.activation not in ACTIVATIONS:
            raise InputError(
                f"T5Config: feed_forward_proj = {config.feed_forward_proj!r} is not supported "
                f"(supported: {', '.join(ACTIVATIONS)}, each also with gated- before it)"
            )
        return config

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        # An exception of transformers for v1.1, whose files say gelu and mean its approximation.
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name


def relative_position_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "t t"]:
    """Return the bucket of each (query, key).

    Near keys have one bucket a distance; then buckets become wider, and the last one begins at
    `max_distance`. Keys after the query have the upper half of the buckets.
    """
    key_is_after = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(key_is_after)
    half = num_buckets // 2
    near = half // 2
    share = np.log(np.maximum(distance, 1) / near) / math.log(max_distance / near)
    # 1e-9: a distance on the edge of two buckets belongs to the wider one, also if log rounds down.
    far = near + np.floor(share * (half - near) + 1e-9)
    bucket = np.where(distance < near, distance, np.minimum(far, half - 1))
    return (bucket + half * (key_is_after > 0)).astype(np.int32)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, use_bias=False, rngs=rngs)


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)


class T5Attention(nnx.Module):
    """Attend without scaling the scores; a bias says how far apart the tokens are."""

    def __init__(self, config: T5Config, *, has_relative_attention_bias: bool, rngs: nnx.Rngs):
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv  # unlike elsewhere, not always d_model
        self.q, self.k, self.v = (_linear(config.d_model, inner, rngs) for _ in range(3))
        self.o = _linear(inner, config.d_model, rngs)
        if has_relative_attention_bias:
            self.buckets = config.relative_attention_num_buckets
            self.max_distance = config.relative_attention_max_distance
            self.relative_attention_bias = embed(self.buckets, self.heads, rngs=rngs)

    def position_bias(self, length: int) -> Float[Array, "1 heads t t"]:
        buckets = relative_position_buckets(length, self.buckets, self.max_distance)
        bias = self.relative_attention_bias(jnp.asarray(buckets))  # [T, T, heads]
        return jnp.moveaxis(bias, -1, 0)[None]

    def __call__(self, x, bias, mask):
        return self.o(
            dot_product_attention(
                self.q(x), self.k(x), self.v(x), self.heads, bias=bias, mask=mask, scale=1.0
            )
        )


class T5LayerSelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, has_relative_attention_bias: bool, rngs: nnx.Rngs):
        self.SelfAttention = T5Attention(
            config, has_relative_attention_bias=has_relative_attention_bias, rngs=rngs
        )
        self.layer_norm = _norm(config, rngs)

    def __call__(self, x, bias, mask):
        return x + self.SelfAttention(self.layer_norm(x), bias, mask)


class T5Dense(nnx.Module):
    """Mirror transformers' `T5DenseActDense` and `T5DenseGatedActDense`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.activation, self.is_gated = ACTIVATIONS[config.activation], config.is_gated
        if self.is_gated:
            self.wi_0, self.wi_1 = (_linear(config.d_model, config.d_ff, rngs) for _ in range(2))
        else:
            self.wi = _linear(config.d_model, config.d_ff, rngs)
        self.wo = _linear(config.d_ff, config.d_model, rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        if self.is_gated:
            return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(self.activation(self.wi(x)))


class T5LayerFF(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.DenseReluDense = T5Dense(config, rngs=rngs)  # sic, whatever the activation
        self.layer_norm = _norm(config, rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nnx.Module):
    def __init__(self, config: T5Config, *, has_relative_attention_bias: bool, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [
                T5LayerSelfAttention(
                    config, has_relative_attention_bias=has_relative_attention_bias, rngs=rngs
                ),
                T5LayerFF(config, rngs=rngs),
            ]
        )

    def __call__(self, x, bias, mask):
        return self.layer[1](self.layer[0](x, bias, mask))


class T5Stack(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.block = nnx.List(
            [
                T5Block(config, has_relative_attention_bias=i == 0, rngs=rngs)
                for i in range(config.num_layers)
            ]
        )
        self.final_layer_norm = _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t c"], attention_mask: Int[Array, "b t"] | None
    ) -> Float[Array, "b t c"]:
        mask = None if attention_mask is None else attention_mask != 0
        # The bias of the first block serves all of them.
        bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1])
        x = repeat(self.block, lambda block, x: block(x, bias, mask), x)
        return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
    """Encode text, as the third text encoder of Stable Diffusion 3."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = embed(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = T5Stack(config, rngs=rngs)

    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t c"]:
        """Return the last hidden state; the mask is 0 at pads.

        Without a mask tokens attend to pads as well, as in SD 3.
        """
        return self.encoder(self.shared(input_ids), attention_mask)
