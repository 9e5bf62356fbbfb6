"""ImageReward's network: BLIP's vision transformer, MED BERT that reads the image, and an MLP.

It mirrors ImageReward `ImageReward.py`, `models/BLIP/{vit,med,blip_pretrain}.py`, and CycleReward,
which differs in its MLP (cyclereward `model.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.attention import dot_product_attention
from r0_jax.models.bert import BertConfig, BertEmbeddings, BertEncoder
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat
from r0_jax.models.score_mlp import ScoreMLP

_EPS = 1e-6
_PROJECTION = 256  # of BLIP's contrastive loss; in the file, not in the score
# Mean and standard deviation of the raw scores on ImageRewardDB.
MEAN, STD = 0.16717362830052426, 1.0333394966054072


@dataclasses.dataclass(frozen=True)
class BLIPVisionConfig:
    """Mirror BLIP's `VisionTransformer`; the defaults are ViT-L/16."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
    """Hold the configs of both halves."""

    vision_config: BLIPVisionConfig
    text_config: BertConfig

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ImageRewardConfig":
        """Parse {"vision_config": {...}, "text_config": {...}}; defaults are those of v1.0."""
        vision, text = fields.get("vision_config", {}), fields.get("text_config", {})
        if not (isinstance(vision, Mapping) and isinstance(text, Mapping)):
            raise InputError("ImageRewardConfig: vision_config and text_config must be objects")
        vision = configs.parse(BLIPVisionConfig, vision)
        configs.check_least(vision, 1, *(f.name for f in dataclasses.fields(vision)))
        if vision.width % vision.heads:
            raise InputError(
                f"BLIPVisionConfig: heads = {vision.heads} does not divide width = {vision.width}"
            )
        # This class, and not a field, says that the layers attend to the image.
        text = {k: v for k, v in text.items() if k not in ("add_cross_attention", "encoder_width")}
        return cls(vision, BertConfig.from_json({"vocab_size": 30524} | text))


class PatchEmbed(nnx.Module):
    def __init__(self, config: BLIPVisionConfig, *, rngs: nnx.Rngs):
        patch = config.patch_size
        self.proj = Conv(
            3, config.width, kernel_size=(patch, patch), strides=patch, padding="VALID", rngs=rngs
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t c"]:
        patches = self.proj(images)
        return patches.reshape(len(patches), -1, patches.shape[-1])


class VisionAttention(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        return self.proj(dot_product_attention(query, key, value, self.heads))


class VisionMLP(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, 4 * width, rngs=rngs)
        self.fc2 = Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionBlock(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.attn = VisionAttention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.mlp = VisionMLP(width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BLIPVisionTransformer(nnx.Module):
    def __init__(self, config: BLIPVisionConfig, *, rngs: nnx.Rngs):
        width, tokens = config.width, (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = nnx.List(
            [VisionBlock(width, config.heads, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = LayerNorm(width, epsilon=_EPS, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t c"]:
        """Return all tokens, the class token first."""
        x = self.patch_embed(images)
        token = jnp.broadcast_to(self.cls_token.get_value(), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.pos_embed.get_value()
        return self.norm(repeat(self.blocks, lambda block, x: block(x), x))


class MEDBert(nnx.Module):
    """Encode text by a BERT whose every layer also attends to the image's tokens."""

    def __init__(self, config: BertConfig, context_size: int, *, rngs: nnx.Rngs):
        self.embeddings = BertEmbeddings(config, token_types=False, rngs=rngs)
        self.encoder = BertEncoder(config, context_size=context_size, rngs=rngs)

    def __call__(
        self, input_ids: Int[Array, "b t"], mask: Bool[Array, "b t"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b t c"]:
        return self.encoder(self.embeddings(input_ids), mask, context)


class BLIP(nnx.Module):
    def __init__(self, config: ImageRewardConfig, *, rngs: nnx.Rngs):
        width, text = config.vision_config.width, config.text_config
        self.visual_encoder = BLIPVisionTransformer(config.vision_config, rngs=rngs)
        self.text_encoder = MEDBert(text, width, rngs=rngs)
        self.vision_proj = Linear(width, _PROJECTION, rngs=rngs)
        self.text_proj = Linear(text.hidden_size, _PROJECTION, rngs=rngs)

    def __call__(
        self, input_ids: Int[Array, "b t"], images: Float[Array, "b h w 3"]
    ) -> Float[Array, "b c"]:
        """Return the first text token after it has read the image; id 0 is padding."""
        tokens = self.visual_encoder(images)
        return self.text_encoder(input_ids, input_ids != 0, tokens)[:, 0]


class ImageReward(nnx.Module):
    activation: str | None = None  # of the MLP

    def __init__(self, config: ImageRewardConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.blip = BLIP(config, rngs=rngs)
        self.mlp = ScoreMLP(config.text_config.hidden_size, activation=self.activation, rngs=rngs)

    def raw(
        self, input_ids: Int[Array, "b t"], images: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """Return what the MLP says of preprocessed images, in the dtype of its weights."""
        token = self.blip(input_ids, images)
        return self.mlp(token.astype(self.mlp.layers[0].kernel.get_value().dtype))

    def __call__(
        self, input_ids: Int[Array, "b t"], images: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """Return standardized scores of preprocessed images, in the dtype of the MLP's weights."""
        return (self.raw(input_ids, images) - MEAN) / STD


class CycleReward(ImageReward):
    activation = "gelu"

    def __call__(
        self, input_ids: Int[Array, "b t"], images: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """Return scores of preprocessed images, in the dtype of the MLP's weights."""
        return self.raw(input_ids, images)
