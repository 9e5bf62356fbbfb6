"""The reward networks at the published widths and depths, with random weights, against PyTorch.

Not among the tests of every day: gigabytes and minutes each. `make parity` runs them.
"""

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
import torch_twins
from parity import normal

from r0_jax.convert_reward import REWARDS
from r0_jax.models import chinese_clip, open_clip

pytestmark = pytest.mark.full_width
IMAGE_REWARD = {
    "vision": {"image_size": 224, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16},
    "text": {"vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": 3072,
             "max_position_embeddings": 512}}


@pytest.mark.parametrize(("reward", "twin", "fields"), [
    ("hps_v2_1", torch_twins.OpenCLIP, open_clip.ARCHITECTURES["ViT-H-14"]),
    ("clip_score", torch_twins.OpenCLIP, open_clip.ARCHITECTURES["ViT-L-14"]),
    ("chinese_clip", torch_twins.CNCLIP, chinese_clip.ARCHITECTURES["ViT-B-16"]),
], ids=["ViT-H-14", "ViT-L-14", "chinese ViT-B-16"])
def test_cosine_and_image_gradient(reward, twin, fields):
    module = tiny.randomize(twin(fields), seed=0)
    network = REWARDS[reward][0].network(fields)
    words = fields.get("vocab_size", 49408)
    ids = np.random.default_rng(0).integers(1, words - 1, (1, 20)).astype(np.int32)
    ids = np.pad(ids, ((0, 0), (0, 32)))  # 52 tokens: Chinese-CLIP's length
    ids[0, 20] = words - 1
    if reward != "chinese_clip":
        ids = np.pad(ids, ((0, 0), (0, 25)))

    def ours(params, images):
        text = network.apply(params, "text_features", jnp.asarray(ids))
        image = network.apply(params, "image_features", images)
        text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
        return jnp.sum(text * image, axis=-1)

    def theirs(images):
        text, image = module.text_features(torch.tensor(ids)), module.image_features(images)
        return torch.nn.functional.cosine_similarity(text, image)

    compare(ours, theirs, module, network)


def test_image_reward():
    module = tiny.randomize(torch_twins.ImageReward(*IMAGE_REWARD.values()), seed=0)
    network = REWARDS["image_reward"][0].network({})
    ids = np.random.default_rng(0).integers(999, 30000, (1, 35)).astype(np.int32)
    ids[0, 20:] = 0
    compare(lambda params, images: network(params, jnp.asarray(ids), images),
            lambda images: module(torch.tensor(ids), images), module, network)


def compare(ours, theirs, module, network):
    """Scores within 1e-4, image gradients within 1e-3 of their largest element."""
    params = parity.params_of(module, network.shapes)
    parity.compare(ours, params, theirs, normal(0, 1, 224, 224, 3), output=1e-4, gradient=1e-3)
