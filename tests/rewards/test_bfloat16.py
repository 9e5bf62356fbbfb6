"""bfloat16 towers with float32 heads against float32 throughout, for every type of reward.

Scores are compared in units of their scale: 1 for cosines, exp(logit_scale) for PickScore, and 1
for ImageReward (the standard deviation on its training set) and the aesthetic head (whose scores of
photographs differ by about 1). Towers are narrow and four layers deep, with weights that keep
activations at the size of trained ones; tests/test_full_width.py does the same at full size.
"""

import numpy as np
import pytest
import tiny
import torch_twins
from safetensors.torch import save_file
from torch_preprocess import noise
from vocabularies import WORDS

from r0_jax import convert_reward, rewards

LAYERS = 4
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "layers": LAYERS,
        "width": 64,
        "head_width": 16,
        "patch_size": 8,
        "image_size": 32,
    },
    "text_cfg": {
        "layers": LAYERS,
        "width": 32,
        "heads": 2,
        "context_length": 16,
        "vocab_size": 521,
    },
}
CN_CLIP = {
    "embed_dim": 32,
    "vision_layers": LAYERS,
    "vision_width": 64,
    "vision_head_width": 16,
    "vision_patch_size": 8,
    "image_resolution": 32,
    "vocab_size": len(WORDS),
    "text_hidden_size": 32,
    "text_num_hidden_layers": LAYERS,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 64,
}
IMAGE_REWARD = {
    "vision_config": {"image_size": 32, "patch_size": 8, "width": 64, "layers": LAYERS, "heads": 4},
    "text_config": {
        "vocab_size": len(WORDS) + 2,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
    },
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
TWINS = {
    "hps_v2": (OPEN_CLIP, torch_twins.OpenCLIP),
    "hps_v2_1": (OPEN_CLIP, torch_twins.OpenCLIP),
    "clip_score": (OPEN_CLIP | {"quick_gelu": True}, torch_twins.OpenCLIP),
    "chinese_clip": (CN_CLIP, torch_twins.CNCLIP),
    "image_reward": (IMAGE_REWARD, lambda fields: torch_twins.ImageReward(*fields.values())),
}
PROMPTS = ["a red square", "一个红色的方块", "squares", "red", "", "a", "e d", "quare"]


def folder_of(kind, folder, tokenizer):
    """A reward's folder with random weights."""
    if kind in ("pickscore", "aesthetic"):
        tiny.clip(folder, seed=4, text=SIZES, vision=SIZES | {"image_size": 32, "patch_size": 8})
        head = tiny.randomize(torch_twins.score_mlp(12), seed=5)
        save_file(head.state_dict(), folder / "aesthetic_head.safetensors")
        return folder
    fields, twin = TWINS[kind]
    module = tiny.randomize(twin(fields), seed=list(TWINS).index(kind))
    path = folder / "published.safetensors"
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
    convert_reward.convert_reward(kind, path, folder, tokenizer, fields)
    return folder


@pytest.mark.parametrize("kind", [*TWINS, "pickscore", "aesthetic"])
def test_scores_and_gradients_of_bfloat16_towers(kind, tmp_path, bpe, vocab):
    folder = folder_of(kind, tmp_path, vocab if kind in ("chinese_clip", "image_reward") else bpe)
    images, found = np.concatenate([noise(48, 48, seed) for seed in range(4)]), {}
    for dtype in ("float32", "bfloat16"):
        reward = rewards.load(kind, folder, dtype)
        scores, gradients = reward.value_and_grad(images, PROMPTS)
        assert scores.dtype == gradients.dtype == np.float32
        found[dtype] = np.asarray(scores), np.asarray(gradients).reshape(len(images), -1)
    (scores, gradients), (half, half_gradients) = found.values()
    scale = (
        np.exp(tiny.CLIPModel.from_pretrained(folder).logit_scale.item())
        if kind == "pickscore"
        else 1.0
    )
    # Seen: up to 5e-3, and 0.9997.
    assert 0 < np.abs(half - scores).max() < 1e-2 * scale
    cosines = np.sum(gradients * half_gradients, 1) / (
        np.linalg.norm(gradients, axis=1) * np.linalg.norm(half_gradients, axis=1)
    )
    assert cosines.min() > 0.99
