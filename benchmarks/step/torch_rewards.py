"""The rewards of the twin: networks of transformers, with differentiable preprocessing."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from r0_jax.files import read_json


class ClipScore:
    """The cosine of images and prompts, whose features are known."""

    def __init__(self, path: str, features: Tensor):
        """Read the image tower of a transformers folder; `features` [B, D] have norm 1."""
        tower = CLIPVisionModelWithProjection.from_pretrained(path, dtype=torch.float32)
        self.tower, self.features = tower.eval().requires_grad_(False), features
        fields = read_json(Path(path) / "preprocessor_config.json")
        mean = fields.get("image_mean", OPENAI_CLIP_MEAN)
        std = fields.get("image_std", OPENAI_CLIP_STD)
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
        self.size = tower.config.image_size

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores [B] of square images in [0, 1], [B, 3, h, w]."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        features = self.tower((images - self.mean) / self.std).image_embeds
        return (F.normalize(features, dim=-1) * self.features).sum(dim=-1)
