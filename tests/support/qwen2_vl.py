"""Qwen2-VL of transformers: HPSv3 made of its parts, whole ones in miniature, and their inputs."""

import math
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLTextModel,
)

transformers.logging.set_verbosity_error()

FIELDS = {
    "model_type": "qwen2_vl",
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
    "image_token_id": 190,
    "video_token_id": 191,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
    "vision_config": {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_act": "quick_gelu",
    },
}


def config_of(fields: dict[str, Any]) -> Qwen2VLConfig:
    config = Qwen2VLConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
    return config


class HPSv3(nn.Module):
    """Its names are those of the published file, but for lm_head."""

    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        config = config_of(fields)
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model = Qwen2VLTextModel(config.text_config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def image_tokens(self, images: torch.Tensor) -> torch.Tensor:
        found = self.visual(*patches(images)).pooler_output
        return found.reshape(len(images), -1, found.shape[-1])

    def forward(self, images, before: list[int], after: list[list[int]]) -> torch.Tensor:
        """Scores of normalized images [B, 3, h, w], each with a text that ends in <|Reward|>.

        Positions are 0, 1, ... on all axes, as the published code leaves them to transformers
        4.45.2. What follows <|Reward|> cannot change its state.
        """
        rows, table = [], self.model.embed_tokens
        for image, text in zip(self.image_tokens(images), after, strict=True):
            x = torch.cat([table(torch.tensor(before)), image, table(torch.tensor(text))])[None]
            positions = torch.arange(x.shape[1]).expand(3, 1, -1)
            found = self.model(inputs_embeds=x, position_ids=positions)
            rows.append(found.last_hidden_state[0, -1])
        return self.rm_head(torch.stack(rows))[:, 0]


def hps_v3(seed: int = 0, **fields: Any) -> HPSv3:
    return _randomize(HPSv3(FIELDS | fields), seed)


def model(seed: int = 0, **fields: Any) -> Qwen2VLForConditionalGeneration:
    return _randomize(Qwen2VLForConditionalGeneration(config_of(FIELDS | fields)), seed)


def _randomize(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(name.endswith("weight") + 0.3 * noise)
            else:  # sharp attention, so that a wrong position shows
                wide = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1
                value.copy_(wide * noise / math.sqrt(value[0].numel()))
    return module.eval()


def state_of(module: Qwen2VLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights under the names of the published files."""
    renamed = {"model.visual.": "visual.", "model.language_model.": "model."}
    state = {}
    for key, value in module.state_dict().items():
        old = next((prefix for prefix in renamed if key.startswith(prefix)), "")
        state[renamed.get(old, "") + key.removeprefix(old)] = value.detach()
    return state


def patches(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the processor of transformers makes of images [B, 3, h, w], and their grids."""
    b, _, h, w = images.shape
    x = images[:, None].repeat(1, 2, 1, 1, 1)  # two frames
    x = x.reshape(b, 1, 2, 3, h // 28, 2, 14, w // 28, 2, 14)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 14 * 14)
    return x, torch.tensor([[1, h // 14, w // 14]] * b)


def next_word(module, images: torch.Tensor, before: list[int], after: list[int]) -> torch.Tensor:
    """The logits of the word after one text, by transformers alone: its own mrope positions."""
    pixels, grid = patches(images)
    tokens, image = images.shape[-1] * images.shape[-2] // 28**2, module.config.image_token_id
    ids = torch.tensor([[*before, *[image] * tokens, *after]] * len(images))
    return module(
        input_ids=ids,
        pixel_values=pixels,
        image_grid_thw=grid,
        mm_token_type_ids=(ids == image).int(),
    ).logits[:, -1]
