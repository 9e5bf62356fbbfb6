"""CLIP, and its text tower alone: transformers `models/clip/modeling_clip.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from r0_jax.errors import InputError
from r0_jax.files import kind_of
from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import dot_product_attention
from r0_jax.models.embeddings import embed
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat


def _parse(cls, fields: Mapping[str, Any], tower: str):
    """Parse a tower's config from its own config.json, or from that of the whole CLIPModel."""
    fields = fields.get(tower, fields)
    if not isinstance(fields, Mapping):
        raise InputError(f"{cls.__name__}: {tower} is a {kind_of(fields)}, not an object")
    config = configs.parse_transformers(cls, fields, ids=("eos_token_id",))
    configs.check_layers(config)
    return config


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Mirror the fields and defaults of transformers' `CLIPTextConfig`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CLIPTextConfig":
        return _parse(cls, fields, "text_config")


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Mirror the fields and defaults of transformers' `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CLIPVisionConfig":
        return _parse(cls, fields, "vision_config")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Mirror the fields and defaults of transformers' `CLIPConfig`."""

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CLIPConfig":
        """Parse a published `config.json` of a `CLIPModel`."""
        if not ("text_config" in fields and "vision_config" in fields):
            raise InputError(
                "CLIPConfig: text_config and vision_config are missing: "
                "this is not the config.json of a CLIPModel"
            )
        # Old files repeat the sub-configs under *_config_dict. Those are in force, also by the
        # defaults of fields that they do not have.
        text, vision = (
            fields[name] if fields.get(f"{name}_dict") is None else fields[f"{name}_dict"]
            for name in ("text_config", "vision_config")
        )
        return configs.parse(
            cls,
            {
                "text_config": CLIPTextConfig.from_json({"text_config": text}),
                "vision_config": CLIPVisionConfig.from_json({"vision_config": vision}),
                **{
                    k: fields[k]
                    for k in ("projection_dim", "logit_scale_init_value")
                    if k in fields
                },
            },
        )


class CLIPAttention(nnx.Module):
    def __init__(self, width: int, heads: int, *, is_causal: bool, rngs: nnx.Rngs):
        self.heads, self.is_causal = heads, is_causal
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.out_proj(
            dot_product_attention(
                self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, is_causal=self.is_causal
            )
        )


class CLIPMLP(nnx.Module):
    def __init__(self, width: int, inner: int, hidden_act: str, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[hidden_act]
        self.fc1 = Linear(width, inner, rngs=rngs)
        self.fc2 = Linear(inner, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(
            width, config.num_attention_heads, is_causal=is_causal, rngs=rngs
        )
        self.layer_norm1 = LayerNorm(width, epsilon=eps, rngs=rngs)
        self.mlp = CLIPMLP(width, config.intermediate_size, config.hidden_act, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, epsilon=eps, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, *, is_causal: bool, rngs):
        self.layers = nnx.List(
            [
                CLIPEncoderLayer(config, is_causal=is_causal, rngs=rngs)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.with_penultimate(x)[0]

    def with_penultimate(
        self, x: Float[Array, "b t c"]
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b t c"]]:
        """Return the last block's output and its input."""
        *first, last = self.layers
        x = repeat(first, lambda layer, x: layer(x), x)
        return repeat([last], lambda layer, x: layer(x), x), x


class CLIPTextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = embed(
            config.max_position_embeddings, config.hidden_size, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        positions = self.position_embedding(jnp.arange(input_ids.shape[1]))
        return self.token_embedding(input_ids) + positions[None]


class TextFeatures(NamedTuple):
    """Hold what the text tower gives.

    Attributes:
      last_hidden_state: all tokens after the final LayerNorm.
      pooled: the end-of-text one of them.
      penultimate: all tokens before the last block, without a LayerNorm (hidden_states[-2]).
    """

    last_hidden_state: Float[Array, "b t c"]
    pooled: Float[Array, "b c"]
    penultimate: Float[Array, "b t c"]


class CLIPTextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, is_causal=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b t"]) -> TextFeatures:
        last, penultimate = self.encoder.with_penultimate(self.embeddings(input_ids))
        hidden = self.final_layer_norm(last)
        # Published configs say eos_token_id 2, which is wrong. Only for them the pooled token is
        # the one with the highest id.
        is_eos = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        eos = jnp.argmax(is_eos, axis=-1)[:, None, None]  # the first one
        pooled = jnp.take_along_axis(hidden, eos, axis=1)[:, 0]
        return TextFeatures(hidden, pooled, penultimate)


class CLIPVisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.patch_embedding = Conv(
            config.num_channels,
            width,
            kernel_size=(patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            rngs=rngs,
        )
        tokens = (config.image_size // patch) ** 2 + 1
        self.position_embedding = embed(tokens, width, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t c"]:
        patches = self.patch_embedding(images)
        b, h, w, c = patches.shape
        patches = patches.reshape(b, h * w, c)
        token = self.class_embedding.get_value().astype(patches.dtype)
        token = jnp.broadcast_to(token[None, None], (b, 1, c))
        positions = self.position_embedding(jnp.arange(h * w + 1))
        return jnp.concatenate([token, patches], axis=1) + positions[None]


class CLIPVisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = CLIPVisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = LayerNorm(width, epsilon=eps, rngs=rngs)  # sic: the file's name
        self.encoder = CLIPEncoder(config, is_causal=False, rngs=rngs)
        self.post_layernorm = LayerNorm(width, epsilon=eps, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """Return the class token after the last LayerNorm."""
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(hidden[:, 0])


class CLIPTextModel(nnx.Module):
    """Encode text for Stable Diffusion."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b t"]) -> TextFeatures:
        return self.text_model(input_ids)


class CLIPTextModelWithProjection(nnx.Module):
    """Encode text; the pooled token is projected into the space shared with images."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs=rngs)
        self.text_projection = Linear(
            config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b t"]) -> TextFeatures:
        features = self.text_model(input_ids)
        return features._replace(pooled=self.text_projection(features.pooled))


class CLIPModel(nnx.Module):
    """Hold both towers and the temperature."""

    text_parts = ("text_model", "text_projection")  # what only `text_features` needs

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        text, vision, width = config.text_config, config.vision_config, config.projection_dim
        self.text_model = CLIPTextTransformer(text, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(vision, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, width, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(vision.hidden_size, width, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def text_features(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Return projected text features, not normalized."""
        return self.text_projection(self.text_model(input_ids).pooled)

    def image_features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return projected features of preprocessed images, not normalized."""
        return self.visual_projection(self.vision_model(images))

    def __call__(
        self, input_ids: Int[Array, "t l"], images: Float[Array, "b h w 3"]
    ) -> Float[Array, "b t"]:
        """Return exp(logit_scale) times the cosine of every image with every text."""
        text, image = self.text_features(input_ids), self.image_features(images)
        text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
        return jnp.exp(self.logit_scale.get_value()) * image @ text.T
