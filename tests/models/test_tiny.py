"""The tiny autoencoder against diffusers, forward and backward."""

import dataclasses
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
from diffusers import AutoencoderTiny as TorchTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock as TorchBlock
from parity import normal
from published import config_of

from r0_jax.errors import InputError
from r0_jax.files import read_json
from r0_jax.models.autoencoder_tiny import (
    AutoencoderTiny,
    AutoencoderTinyBlock,
    AutoencoderTinyConfig,
)
from r0_jax.weights import convert
from r0_jax.weights.network import Network, init

DATA = pathlib.Path(__file__).parents[1] / "data"
STEM = "diffusion_pytorch_model"

TAESD = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}
CONFIGS = {
    "taesd": {},
    "taesd3": {"latent_channels": 16},
    # Every number its own.
    "uneven": {
        "in_channels": 4,
        "out_channels": 5,
        "latent_channels": 6,
        "encoder_block_out_channels": (12, 12),
        "num_encoder_blocks": (0, 2),
        "decoder_block_out_channels": (7, 7, 7, 7),
        "num_decoder_blocks": (1, 0, 1, 2),
        "upsampling_scaling_factor": 3,
    },
}


def abstract(fields):
    config = AutoencoderTinyConfig.from_json(fields)
    return Network.abstract(lambda rngs: AutoencoderTiny(config, rngs=rngs))


def twins(folder, **fields):
    """A torch autoencoder and ours, with the same weights, by way of diffusers' folder."""
    module = tiny.randomize(TorchTiny(**TAESD | fields), seed=0)
    module.save_pretrained(folder)
    network = abstract(read_json(folder / "config.json"))
    return module, network, convert.load(convert.find_files(folder, STEM), network)


def compare(module, network, params, height, width):
    """Encodes images of this size, and decodes latents of it."""
    config = network.config
    parity.compare(
        lambda params, images: network.apply(params, "encode", images),
        params,
        lambda images: module.encode(images).latents,
        normal(0, 2, height, width, config.in_channels),
    )
    parity.compare(
        lambda params, latents: network.apply(params, "decode", latents),
        params,
        lambda latents: module.decode(latents).sample,
        3 * normal(1, 2, height, width, config.latent_channels),
    )  # to feel the tanh


def test_block():
    module = tiny.randomize(TorchBlock(8, 8, "relu"), seed=0)
    network = parity.part(lambda rngs: AutoencoderTinyBlock(8, rngs=rngs))
    parity.compare(network, parity.params_of(module, network.shapes), module, normal(0, 2, 4, 3, 8))


@pytest.mark.parametrize(
    "name, height, width", [("taesd", 8, 12), ("taesd3", 5, 7), ("uneven", 3, 4)]
)
def test_encode_and_decode(name, height, width, tmp_path):
    compare(*twins(tmp_path, **CONFIGS[name]), height, width)


def test_what_is_made_here_loads_in_diffusers(tmp_path):
    network = abstract(TAESD)
    params = init(lambda rngs: AutoencoderTiny(network.config, rngs=rngs), jax.random.key(0))
    convert.save(params, tmp_path / f"{STEM}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TAESD), "utf-8")
    module, info = TorchTiny.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    compare(module, network, params, 4, 4)


def test_the_call_reconstructs(tmp_path):
    module, network, params = twins(tmp_path)
    parity.compare(
        network,
        params,
        lambda x: module.decode(module.encode(x).latents).sample,
        normal(0, 2, 8, 8, 3),
    )


@pytest.mark.parametrize(
    "config, manifest",
    [
        ("taesd", "taesd_diffusers"),
        ("taesdxl", "taesd_diffusers"),
        ("taesd3", "taesd3_diffusers"),
        ("taef1", "taesd3_diffusers"),
    ],
)
def test_names_and_shapes_are_those_of_the_published_file(config, manifest):
    network = abstract(config_of(config))
    published = read_json(DATA / "keys" / f"{manifest}.json")
    ours = {}
    for name, struct in network.shapes.items():
        zeros = np.broadcast_to(np.float32(0), struct.shape)  # one number, whatever the shape
        ours[convert.to_key(name)] = convert.to_checkpoint(name, zeros).shape
    assert ours == {key: tuple(shape) for key, shape in published["keys"].items()}
    assert sum(struct.size for struct in network.shapes.values()) == published["_num_elements"]
    assert network.config.block_out_channels == (64,) * 4


def test_bfloat16(tmp_path):
    module, network, params = twins(tmp_path)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    latents = normal(0, 2, 4, 4, 4)

    def decode(params, latents):
        return network.apply(params, "decode", latents)

    args = params, jnp.asarray(latents, jnp.bfloat16)
    output = jax.jit(decode)(*args)
    assert output.dtype == jnp.bfloat16
    expected = module.decode(parity.to_torch(latents)).sample
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected), 1e-1)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "silu"},
        {"upsample_fn": "bilinear"},
        {"encoder_block_out_channels": [8, 8, 16]},
        {"decoder_block_out_channels": [16, 8, 8]},
        {"decoder_block_out_channels": []},
        {"num_encoder_blocks": [1, 3]},
        {"num_decoder_blocks": [3, 3, 3, 1]},
        {"num_decoder_blocks": [1, -1, 1]},
        {"num_decoder_blocks": 3},
        {"encoder_block_out_channels": [0, 0, 0]},
        {"latent_channels": 0},
        {"in_channels": True},
        {"upsampling_scaling_factor": 1.5},
        {"scaling_factor": None},
        {"scaling_factor": 0.0},
        {"scaling_factor": float("nan")},
        {"shift_factor": float("inf")},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        AutoencoderTinyConfig.from_json(TAESD | change)
    assert len(str(error.value).splitlines()) == 1


def test_fields_without_an_effect_are_accepted_and_defaults_are_those_of_diffusers():
    config = AutoencoderTinyConfig.from_json(
        {
            "force_upcast": False,
            "latent_magnitude": 3,
            "latent_shift": 0.5,
            "block_out_channels": [64] * 4,
            "_diffusers_version": "0.19.0",
        }
    )
    assert config == AutoencoderTinyConfig()
    parameters = inspect.signature(TorchTiny.__init__).parameters
    for name, value in dataclasses.asdict(config).items():
        assert value == parameters[name].default, name
