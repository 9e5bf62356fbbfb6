"""CLIP under OpenAI's names, which open_clip keeps: `open_clip/model.py`, `transformer.py`.

HPS, the OpenCLIP checkpoints and the image half of the original Chinese-CLIP files have this form.
Attention's three projections stay one matrix, in torch's (out, in) layout, as in the file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import dot_product_attention
from r0_jax.models.embeddings import embed
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat

_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class VisionCfg:
    """Mirror the fields and defaults of open_clip's `CLIPVisionCfg`."""

    layers: int = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int = 224

    @property
    def heads(self) -> int:
        return self.width // self.head_width


@dataclasses.dataclass(frozen=True)
class TextCfg:
    """Mirror the fields and defaults of open_clip's `CLIPTextCfg`."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


@dataclasses.dataclass(frozen=True)
class OpenCLIPConfig:
    """Hold the `model_cfg` of an `open_clip_config.json`."""

    embed_dim: int
    vision_cfg: VisionCfg
    text_cfg: TextCfg
    quick_gelu: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "OpenCLIPConfig":
        """Parse a published model config; raise InputError for a field that is not supported."""
        for name in ("embed_dim", "vision_cfg", "text_cfg"):
            if name not in fields:
                raise InputError(
                    f"OpenCLIPConfig: {name} is missing: this is not the model_cfg of "
                    "a CLIP of open_clip"
                )
        parts = {"vision_cfg": VisionCfg, "text_cfg": TextCfg}
        for name in parts:
            if not isinstance(fields[name], Mapping):
                raise InputError(f"OpenCLIPConfig: {name} is not an object")
        parsed = {name: configs.parse(part, fields[name]) for name, part in parts.items()}
        config = configs.parse(cls, {k: v for k, v in fields.items() if k not in parts} | parsed)
        configs.check_least(config, 1, "embed_dim")
        for part, names in (
            (config.vision_cfg, ("layers", "head_width", "patch_size")),
            (config.text_cfg, ("layers", "heads", "context_length")),
        ):
            configs.check_least(part, 1, *names)
            if part.heads < 1 or part.width % part.heads:
                raise InputError(
                    f"{type(part).__name__}: width = {part.width} is not a multiple "
                    "of the width of its heads"
                )
        return config

    @property
    def activation(self) -> str:
        return "quick_gelu" if self.quick_gelu else "gelu"


# Published architectures, by open_clip's names, for checkpoints without a config.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-L-14": {
        "embed_dim": 768,
        "quick_gelu": True,  # as OpenAI trained it
        "vision_cfg": {"layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"width": 768, "heads": 12, "layers": 12},
    },
    "ViT-H-14": {
        "embed_dim": 1024,
        "vision_cfg": {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"width": 1024, "heads": 16, "layers": 24},
    },
    "ViT-bigG-14": {
        "embed_dim": 1280,
        "vision_cfg": {
            "layers": 48,
            "width": 1664,
            "head_width": 104,
            "mlp_ratio": 4.9231,
            "patch_size": 14,
        },
        "text_cfg": {"width": 1280, "heads": 20, "layers": 32},
    },
}


class Attention(nnx.Module):
    """Apply self-attention under the names of torch's `MultiheadAttention`."""

    def __init__(self, width: int, heads: int, *, is_causal: bool, rngs: nnx.Rngs):
        self.heads, self.is_causal = heads, is_causal
        self.in_proj_weight = _normal((3 * width, width), width, rngs)
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        projected = x @ self.in_proj_weight.get_value().T + _row(self.in_proj_bias)
        query, key, value = jnp.split(projected, 3, axis=-1)
        return self.out_proj(
            dot_product_attention(query, key, value, self.heads, is_causal=self.is_causal)
        )


class MLP(nnx.Module):
    def __init__(self, width: int, inner: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[activation]
        self.c_fc = Linear(width, inner, rngs=rngs)
        self.c_proj = Linear(inner, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.c_proj(self.activation(self.c_fc(x)))


class ResidualAttentionBlock(nnx.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: str,
        *,
        is_causal: bool,
        rngs: nnx.Rngs,
    ):
        self.ln_1 = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.attn = Attention(width, heads, is_causal=is_causal, rngs=rngs)
        self.ln_2 = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.mlp = MLP(width, int(width * mlp_ratio), activation, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    def __init__(
        self, cfg: VisionCfg | TextCfg, activation: str, *, is_causal: bool, rngs: nnx.Rngs
    ):
        self.resblocks = nnx.List(
            [
                ResidualAttentionBlock(
                    cfg.width, cfg.heads, cfg.mlp_ratio, activation, is_causal=is_causal, rngs=rngs
                )
                for _ in range(cfg.layers)
            ]
        )

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return repeat(self.resblocks, lambda block, x: block(x), x)


class VisionTransformer(nnx.Module):
    def __init__(self, cfg: VisionCfg, embed_dim: int, activation: str, *, rngs: nnx.Rngs):
        width, patch = cfg.width, cfg.patch_size
        self.class_embedding = _normal((width,), width, rngs)
        tokens = (cfg.image_size // patch) ** 2 + 1
        self.positional_embedding = _normal((tokens, width), width, rngs)
        self.proj = _normal((width, embed_dim), width, rngs)
        self.conv1 = Conv(
            3,
            width,
            kernel_size=(patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            rngs=rngs,
        )
        self.ln_pre = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.transformer = Transformer(cfg, activation, is_causal=False, rngs=rngs)
        self.ln_post = LayerNorm(width, epsilon=_EPS, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return the class token, normed and projected."""
        patches = self.conv1(images)
        b, h, w, c = patches.shape
        token = jnp.broadcast_to(self.class_embedding.get_value()[None, None], (b, 1, c))
        x = jnp.concatenate([token, patches.reshape(b, h * w, c)], axis=1)  # [B, T, C]
        x = self.ln_pre(x + self.positional_embedding.get_value()[None])
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj.get_value()


class OpenCLIP(nnx.Module):
    """Hold both towers and the temperature."""

    # What only `text_features` needs.
    text_parts = (
        "positional_embedding",
        "text_projection",
        "transformer",
        "token_embedding",
        "ln_final",
    )

    def __init__(self, config: OpenCLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        text, width = config.text_cfg, config.text_cfg.width
        self.positional_embedding = _normal((text.context_length, width), width, rngs)
        self.text_projection = _normal((width, config.embed_dim), width, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))  # ln(1 / 0.07)
        self.visual = VisionTransformer(
            config.vision_cfg, config.embed_dim, config.activation, rngs=rngs
        )
        self.transformer = Transformer(text, config.activation, is_causal=True, rngs=rngs)
        self.token_embedding = embed(text.vocab_size, width, rngs=rngs)
        self.ln_final = LayerNorm(width, epsilon=_EPS, rngs=rngs)

    def text_features(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Return projected features of the end-of-text token, not normalized.

        That token has the highest id.
        """
        x = self.token_embedding(input_ids) + self.positional_embedding.get_value()[None]
        x = self.ln_final(self.transformer(x))
        end = jnp.argmax(input_ids, axis=-1)[:, None, None]
        return jnp.take_along_axis(x, end, axis=1)[:, 0] @ self.text_projection.get_value()

    def image_features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return projected features of preprocessed images, not normalized."""
        return self.visual(images)


def _normal(shape: tuple[int, ...], width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape) * width**-0.5)


def _row(bias: nnx.Param) -> Float[Array, "1 1 c"]:
    return bias.get_value()[None, None]
