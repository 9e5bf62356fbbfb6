"""DINOv2 against transformers, forward and backward."""

import parity
import pytest
import tiny
import torch
from parity import normal
from transformers import Dinov2Config as TorchConfig
from transformers import Dinov2Model as TorchModel

from r0_jax.errors import InputError
from r0_jax.evaluation import feature_network
from r0_jax.models.dinov2 import Dinov2Config
from r0_jax.weights import lazy

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 70,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (70, 70)),  # its own size
        ({}, (42, 98)),  # positions are resized, each side on its own
        ({"use_swiglu_ffn": True, "mlp_ratio": 3, "qkv_bias": False}, (28, 28)),
        ({"layer_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh"}, (70, 70)),
    ],
    ids=["own", "resized", "swiglu", "eps"],
)
def test_features_are_those_of_transformers(tmp_path, fields, shape):
    module = tiny.randomize(TorchModel(TorchConfig(**TINY | fields)), seed=0)
    module.save_pretrained(tmp_path)
    found = feature_network.load(tmp_path)
    params = lazy.place(found.params)
    parity.compare(
        lambda params, x: found.network.apply(params, "image_features", x),
        params,
        lambda x: module(pixel_values=x).pooler_output,
        normal(0, 2, *shape, 3),
    )
    assert (found.kind, found.frechet, found.width) == ("dinov2", "frechet_dinov2", 24)
    assert found.prepare.size == 224 and torch.is_tensor(module.layernorm.weight)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads = 5 does not divide"),
        ({"image_size": 8}, "image_size = 8 is smaller than a patch of 14"),
        ({"num_channels": 1}, "num_channels = 1 is not supported"),
        ({"hidden_act": "mish?"}, "hidden_act = 'mish?' is not supported"),
    ],
)
def test_a_config_that_no_network_has(fields, said):
    with pytest.raises(InputError) as error:
        Dinov2Config.from_json(TINY | fields)
    assert said in str(error.value)
