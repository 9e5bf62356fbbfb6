"""Chinese-CLIP: a CLIP vision tower and a Chinese RoBERTa, under either library's names.

It mirrors transformers `models/chinese_clip/modeling_chinese_clip.py` and, for the files that the
authors publish, cn_clip `clip/model.py`.
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
from r0_jax.models.bert import BertConfig, BertModel
from r0_jax.models.clip import CLIPVisionConfig, CLIPVisionTransformer
from r0_jax.models.linear import Linear
from r0_jax.models.open_clip import VisionCfg, VisionTransformer

_PAD = 0


@dataclasses.dataclass(frozen=True)
class ChineseCLIPConfig:
    """Mirror the fields and defaults of transformers' `ChineseCLIPConfig`."""

    text_config: BertConfig
    vision_config: CLIPVisionConfig
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ChineseCLIPConfig":
        """Parse a published `config.json` of a `ChineseCLIPModel`."""
        parts = {}
        for name in ("text_config", "vision_config"):
            part = fields.get(f"{name}_dict") or fields.get(name)
            if not isinstance(part, Mapping):
                raise InputError(
                    f"ChineseCLIPConfig: {name} is missing: this is not the "
                    "config.json of a ChineseCLIPModel"
                )
            parts[name] = {k: v for k, v in part.items() if k != "model_type"}
        return configs.parse(
            cls,
            {
                "text_config": BertConfig.from_json(parts["text_config"]),
                "vision_config": CLIPVisionConfig.from_json(parts["vision_config"]),
                **{
                    k: fields[k]
                    for k in ("projection_dim", "logit_scale_init_value")
                    if k in fields
                },
            },
        )


class ChineseCLIPModel(nnx.Module):
    """Hold both towers under transformers' names."""

    text_parts = ("text_model", "text_projection")  # what only `text_features` needs

    def __init__(self, config: ChineseCLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        text, vision, width = config.text_config, config.vision_config, config.projection_dim
        self.text_model = BertModel(text, add_pooling_layer=False, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(vision, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, width, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(vision.hidden_size, width, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def text_features(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Return projected features of the first token, not normalized; id 0 is padding."""
        hidden = self.text_model(input_ids, input_ids != _PAD).last_hidden_state
        return self.text_projection(hidden[:, 0])

    def image_features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return projected features of preprocessed images, not normalized."""
        return self.visual_projection(self.vision_model(images))


@dataclasses.dataclass(frozen=True)
class CNCLIPConfig:
    """Hold the fields of cn_clip's two JSON files of one model, translated."""

    embed_dim: int
    vision: VisionCfg
    text: BertConfig

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CNCLIPConfig":
        """Parse cn_clip's `vision_model_config` and `text_model_config`, merged into one."""
        names = {
            "vision_layers": "layers",
            "vision_width": "width",
            "vision_patch_size": "patch_size",
            "image_resolution": "image_size",
            "vision_head_width": "head_width",
        }
        for name in ("embed_dim", "vision_width", "text_hidden_size"):
            if name not in fields:
                raise InputError(
                    f"CNCLIPConfig: {name} is missing: give the fields of cn_clip's "
                    "vision and text model configs in one file"
                )
        text = {
            k.removeprefix("text_"): v
            for k, v in fields.items()
            if k.startswith("text_") or k == "vocab_size"
        }
        vision = configs.parse(
            VisionCfg, {new: fields[old] for old, new in names.items() if old in fields}
        )
        configs.check_least(vision, 1, "layers", "head_width", "patch_size")
        return cls(fields["embed_dim"], vision, BertConfig.from_json(text))


_BASE = {
    "vocab_size": 21128,
    "text_hidden_size": 768,
    "text_num_hidden_layers": 12,
    "text_num_attention_heads": 12,
    "text_intermediate_size": 3072,
}
_LARGE = {
    "vocab_size": 21128,
    "text_hidden_size": 1024,
    "text_num_hidden_layers": 24,
    "text_num_attention_heads": 16,
    "text_intermediate_size": 4096,
}
_L_14 = {"embed_dim": 768, "vision_layers": 24, "vision_width": 1024, "vision_patch_size": 14}
# Published architectures, by cn_clip's names: its checkpoints come without a config.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-B-16": _BASE
    | {"embed_dim": 512, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 16},
    "ViT-L-14": _BASE | _L_14,
    "ViT-L-14-336": _BASE | _L_14 | {"image_resolution": 336},
    "ViT-H-14": _LARGE
    | {
        "embed_dim": 1024,
        "vision_layers": 32,
        "vision_width": 1280,
        "vision_head_width": 80,
        "vision_patch_size": 14,
    },
}


class CNCLIP(nnx.Module):
    """Hold both towers under cn_clip's names."""

    text_parts = ("bert", "text_projection")  # what only `text_features` needs

    def __init__(self, config: CNCLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.text.hidden_size
        self.visual = VisionTransformer(config.vision, config.embed_dim, "quick_gelu", rngs=rngs)
        self.bert = BertModel(config.text, add_pooling_layer=False, rngs=rngs)
        self.text_projection = nnx.Param(
            jax.random.normal(rngs.params(), (width, config.embed_dim)) * width**-0.5
        )
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))

    def text_features(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b d"]:
        """Return projected features of the first token, not normalized; id 0 is padding."""
        hidden = self.bert(input_ids, input_ids != _PAD).last_hidden_state
        return hidden[:, 0] @ self.text_projection.get_value()

    def image_features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return projected features of preprocessed images, not normalized."""
        return self.visual(images)
