"""FID's Inception v3 against the same network in torch, from a published file's form."""

import json

import parity
import pytest
import torch
from parity import normal
from torch_inception import Inception

from r0_jax.convert_reward import convert_reward
from r0_jax.errors import InputError
from r0_jax.evaluation import feature_network
from r0_jax.models import inception_v3
from r0_jax.weights import lazy


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A torch network, and the folder made of its file."""
    torch.manual_seed(0)
    module, path = Inception().eval(), tmp_path_factory.mktemp("inception")
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.02, 0.2)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(0, 0.2)
    torch.save(module.state_dict(), path / "pt_inception.pth")
    convert_reward("inception_v3", path / "pt_inception.pth", path / "folder")
    return module, path / "folder"


def test_features_are_those_of_torch(published):
    """Images of 107 pixels: every kind of block, and borders of every kind, in less time."""
    module, folder = published
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "inception_v3"}
    found = feature_network.load(folder)
    params = lazy.place(found.params)
    parity.compare(
        lambda params, x: found.network.apply(params, "image_features", x),
        params,
        module,
        normal(0, 2, 107, 107, 3),
        gradient=2e-2,  # rounding moves some of 94 layers' numbers over the corner of a ReLU
    )
    assert (found.prepare.size, found.width) == (inception_v3.SIDE, inception_v3.WIDTH)
    assert (found.kind, found.frechet) == ("inception_v3", "fid_clean")


def test_a_file_without_a_layer_is_an_error(published, tmp_path):
    module, _ = published
    state = {k: v for k, v in module.state_dict().items() if "Mixed_6e" not in k}
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(InputError, match=r"half\.pth.*Mixed_6e"):
        convert_reward("inception_v3", tmp_path / "half.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
