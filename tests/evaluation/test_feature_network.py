"""How images become the input of the networks that see them, against PIL and the definitions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from r0_jax.errors import InputError
from r0_jax.evaluation import feature_network
from r0_jax.evaluation.feature_network import TensorFlowResize
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.weights import lazy

PIXELS = np.random.default_rng(0).integers(0, 256, (61, 43, 3), np.uint8)


def test_the_clean_resize_is_pils_of_each_channel_in_floats():
    expected = np.stack(
        [
            np.asarray(
                Image.fromarray(PIXELS[..., i].astype(np.float32)).resize((29, 29), Image.BICUBIC)
            )
            for i in range(3)
        ],
        axis=-1,
    )
    half = (128 / 255,) * 3
    found = Preprocess(29, policy="squash", mean=half, std=half).on_host(PIXELS)
    np.testing.assert_allclose(found, (expected - 128) / 128, atol=2e-5)


@pytest.mark.parametrize("size", [29, 100])
def test_the_legacy_resize_is_tensorflows_definition(size):
    """Of `resize_bilinear` with align_corners and half_pixel_centers false, pixel by pixel."""
    expected = np.zeros((size, size, 3))
    for i in range(size):
        for j in range(size):
            y, x = i * 61 / size, j * 43 / size
            top, left = int(y), int(x)
            below, right = min(top + 1, 60), min(left + 1, 42)
            rows = [
                PIXELS[row, left] * (1 - x + left) + PIXELS[row, right] * (x - left)
                for row in (top, below)
            ]
            expected[i, j] = rows[0] * (1 - y + top) + rows[1] * (y - top)
    found = TensorFlowResize(size, mean=(0.0,) * 3, std=(1.0,) * 3).on_host(PIXELS)
    np.testing.assert_allclose(found, expected / 255, atol=1e-5)


def test_a_clip_sees_the_whole_image_with_unit_length(tmp_path):
    tiny.clip(tmp_path, seed=0)
    found = feature_network.load(tmp_path)
    assert (found.kind, found.frechet, found.prepare.policy) == ("clip", "frechet_clip", "squash")
    params = lazy.place(found.params)
    features = found(params, jnp.asarray(found.prepare.on_host(PIXELS)[None]))
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-5)


def test_a_folder_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(InputError, match="'resnet' is not a CLIP"):
        feature_network.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "inception_v3"}))
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        feature_network.load(tmp_path)
