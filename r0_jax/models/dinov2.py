"""DINOv2, a vision transformer, as `transformers/models/dinov2/modeling_dinov2.py` has it.

Its class token sees what is in a picture without any text. Frechet distances of it agree with
people better than those of Inception (Stein et al. 2023, arXiv 2306.04675).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import dot_product_attention
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat

_SHARPNESS = -0.75  # of the bicubic kernel of torch's `interpolate`


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Mirror the fields and defaults of transformers' `Dinov2Config` that change the network."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Dinov2Config":
        """Parse a published config; raise InputError for a field that is not supported."""
        config = configs.parse_transformers(cls, fields, only={"num_channels": (3,)})
        configs.check_layers(config)
        if config.image_size < config.patch_size:
            raise InputError(
                f"Dinov2Config: image_size = {config.image_size} is smaller than a patch of "
                f"{config.patch_size} pixels"
            )
        return config


class Dinov2PatchEmbeddings(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        patch = config.patch_size
        self.projection = Conv(
            config.num_channels,
            config.hidden_size,
            kernel_size=(patch, patch),
            strides=patch,
            padding="VALID",
            rngs=rngs,
        )


class Dinov2Embeddings(nnx.Module):
    """Turn patches into tokens, after the class token. The mask token serves its training only."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width, self.side = config.hidden_size, config.image_size // config.patch_size
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.mask_token = nnx.Param(jnp.zeros((1, width)))
        self.position_embeddings = nnx.Param(jnp.zeros((1, 1 + self.side**2, width)))
        self.patch_embeddings = Dinov2PatchEmbeddings(config, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t c"]:
        patches = self.patch_embeddings.projection(images)
        b, h, w, c = patches.shape
        positions = self.position_embeddings.get_value().astype(patches.dtype)
        first, grid = positions[:, :1], positions[:, 1:]
        if (h, w) != (self.side, self.side):
            rows, columns = (jnp.asarray(bicubic(self.side, n), patches.dtype) for n in (h, w))
            grid = grid.reshape(self.side, self.side, c)
            grid = jnp.einsum("hi,wj,ijc->hwc", rows, columns, grid).reshape(1, h * w, c)
        token = jnp.broadcast_to(self.cls_token.get_value().astype(patches.dtype), (b, 1, c))
        return jnp.concatenate([token + first, patches.reshape(b, h * w, c) + grid], axis=1)


def bicubic(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """Return the matrix that resizes `length` values to `size`, as torch's `interpolate` does.

    Without an antialias, and with the values at the ends repeated.
    """
    matrix = np.zeros((size, length))
    at = (np.arange(size) + 0.5) * length / size - 0.5
    below = np.floor(at).astype(int)
    for shift in range(-1, 3):
        index = np.clip(below + shift, 0, length - 1)
        np.add.at(matrix, (np.arange(size), index), _kernel(np.abs(at - below - shift)))
    return matrix


def _kernel(x: np.ndarray) -> np.ndarray:
    a = _SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


class Dinov2SelfAttention(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width, bias = config.hidden_size, config.qkv_bias
        self.query = Linear(width, width, use_bias=bias, rngs=rngs)
        self.key = Linear(width, width, use_bias=bias, rngs=rngs)
        self.value = Linear(width, width, use_bias=bias, rngs=rngs)


class Dinov2SelfOutput(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.hidden_size, rngs=rngs)


class Dinov2Attention(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.attention = Dinov2SelfAttention(config, rngs=rngs)
        self.output = Dinov2SelfOutput(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        of = self.attention
        return self.output.dense(
            dot_product_attention(of.query(x), of.key(x), of.value(x), self.heads)
        )


class Dinov2MLP(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(width, width * config.mlp_ratio, rngs=rngs)
        self.fc2 = Linear(width * config.mlp_ratio, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.fc2(self.activation(self.fc1(x)))


class Dinov2SwiGLUFFN(nnx.Module):
    """The feed-forward part of the giant model."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        inner = (int(width * config.mlp_ratio * 2 / 3) + 7) // 8 * 8
        self.weights_in = Linear(width, 2 * inner, rngs=rngs)
        self.weights_out = Linear(inner, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        gate, value = jnp.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * value)


class Dinov2LayerScale(nnx.Module):
    def __init__(self, config: Dinov2Config):
        self.lambda1 = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return x * self.lambda1.get_value()[None, None]


class Dinov2Layer(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = LayerNorm(width, epsilon=eps, rngs=rngs)
        self.attention = Dinov2Attention(config, rngs=rngs)
        self.layer_scale1 = Dinov2LayerScale(config)
        self.norm2 = LayerNorm(width, epsilon=eps, rngs=rngs)
        feed_forward = Dinov2SwiGLUFFN if config.use_swiglu_ffn else Dinov2MLP
        self.mlp = feed_forward(config, rngs=rngs)
        self.layer_scale2 = Dinov2LayerScale(config)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Dinov2Encoder(nnx.Module):
    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [Dinov2Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )


class Dinov2Model(nnx.Module):
    """See an image of any size whose sides are multiples of a patch."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Dinov2Embeddings(config, rngs=rngs)
        self.encoder = Dinov2Encoder(config, rngs=rngs)
        self.layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

    def image_features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """Return the class token after the last LayerNorm, of normalized images."""
        hidden = repeat(self.encoder.layer, lambda layer, x: layer(x), self.embeddings(images))
        return self.layernorm(hidden[:, 0])
