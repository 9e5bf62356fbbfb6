"""Every layer of the VAE and the whole of it against diffusers, forward and backward."""

import dataclasses
import inspect

import diffusers
import diffusers.models.unets.unet_2d_blocks as torch_blocks
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention as TorchAttention
from parity import normal

from r0_jax.errors import InputError
from r0_jax.models import autoencoder_kl
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.weights.network import Network

CONFIG = AutoencoderKLConfig.from_json(tiny.VAE)
SMALL = 1e-3  # inputs of parts: at this scale a wrong epsilon of a norm shows


def check(torch_module, constructor, *inputs):
    tiny.randomize(torch_module, seed=0)
    network = parity.part(constructor)
    parity.compare(network, parity.params_of(torch_module, network.shapes), torch_module, *inputs)


def test_attention():
    check(
        TorchAttention(
            8, heads=1, dim_head=8, bias=True, norm_num_groups=4, eps=1e-6, residual_connection=True
        ),
        lambda rngs: autoencoder_kl.SpatialAttention(8, norm_num_groups=4, rngs=rngs),
        SMALL * normal(0, 2, 3, 5, 8),
    )


@pytest.mark.parametrize("attends", [True, False])
def test_mid_block(attends):
    config = AutoencoderKLConfig.from_json(tiny.VAE | {"mid_block_add_attention": attends})
    check(
        torch_blocks.UNetMidBlock2D(
            8, temb_channels=None, resnet_groups=4, attention_head_dim=8, add_attention=attends
        ),
        lambda rngs: autoencoder_kl.MidBlock(8, config, rngs=rngs),
        normal(0, 2, 3, 5, 8),
    )


@pytest.mark.parametrize("resamples", [True, False])
def test_down_and_up_blocks(resamples):
    x = SMALL * normal(0, 2, 5, 4, 8)
    check(
        torch_blocks.DownEncoderBlock2D(
            8, 12, num_layers=1, resnet_groups=4, add_downsample=resamples, downsample_padding=0
        ),
        lambda rngs: autoencoder_kl.DownEncoderBlock2D(
            8, 12, CONFIG, downsamples=resamples, rngs=rngs
        ),
        x,
    )
    check(
        torch_blocks.UpDecoderBlock2D(8, 12, num_layers=2, resnet_groups=4, add_upsample=resamples),
        lambda rngs: autoencoder_kl.UpDecoderBlock2D(8, 12, CONFIG, upsamples=resamples, rngs=rngs),
        x,
    )


CONFIGS = {
    # As of SD 1.5 and SDXL: quant convolutions, mid-block attention.
    "sd15": {"layers_per_block": 2},
    # As of SD3: none of them, more channels; and no attention, and every width its own.
    "sd3": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 6,
        "mid_block_add_attention": False,
        "block_out_channels": (8, 12, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "in_channels": 4,
        "out_channels": 5,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 2,
    },
}

SINGLE = {
    "block_out_channels": (8,),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}


def twins(**fields):
    module = tiny.vae(seed=0, **fields)
    config = AutoencoderKLConfig.from_json(module.config)
    network = Network.abstract(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return module, network, parity.params_of(module, network.shapes)


@pytest.mark.parametrize("name, height, width", [("sd15", 9, 7), ("sd3", 8, 12)])
def test_encode(name, height, width):
    module, network, params = twins(**CONFIGS[name])

    def theirs(images):
        posterior = module.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    parity.compare(
        lambda params, images: network.apply(params, "encode", images),
        params,
        theirs,
        normal(0, 2, height, width, network.config.in_channels),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_decode(name):
    module, network, params = twins(**CONFIGS[name])
    parity.compare(
        lambda params, latents: network.apply(params, "decode", latents),
        params,
        lambda latents: module.decode(latents).sample,
        normal(0, 2, 3, 5, network.config.latent_channels),
    )


def test_the_log_variance_is_clipped_and_the_call_reconstructs_from_the_mean():
    module, network, params = twins(**SINGLE)
    params = {name: np.array(value) for name, value in params.items()}
    params["quant_conv.bias"][4:] = [100, -100, 0, 0]
    with torch.no_grad():
        module.quant_conv.bias.copy_(torch.tensor(params["quant_conv.bias"]))
        images = normal(0, 2, 8, 8, 3)
        posterior = module.encode(parity.to_torch(images)).latent_dist
        expected = module.decode(posterior.mean).sample

    @jax.jit
    def run(params, images):
        return network.apply(params, "encode", images)[1], network(params, images)

    log_variance, reconstruction = run(params, images)
    assert jnp.all(log_variance[..., 0] == 20) and jnp.all(log_variance[..., 1] == -30)
    parity.assert_close(log_variance, parity.to_jax(posterior.logvar), parity.OUTPUT)
    parity.assert_close(reconstruction, parity.to_jax(expected), parity.OUTPUT)


def test_bfloat16():
    module, network, params = twins(**SINGLE)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    latents = normal(0, 2, 4, 4, 4)

    def decode(params, latents):
        return network.apply(params, "decode", latents)

    args = params, jnp.asarray(latents, jnp.bfloat16)
    output = jax.jit(decode)(*args)
    assert output.dtype == jnp.bfloat16
    expected = module.decode(parity.to_torch(latents)).sample
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected), 1e-1)
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}, "conv_general_dilated": {"bfloat16"}}
    assert parity.input_dtypes(decode, *args, primitives=list(expected)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"]},
        {"latents_mean": [0.0]},
        {"block_out_channels": 8},
        {"layers_per_block": [1, 2]},
        {"layers_per_block": 0},
        *({"scaling_factor": x} for x in (0.0, -0.18215, float("nan"), float("inf"), "0.18215")),
        {"shift_factor": float("nan")},
        {"shift_factor": -float("inf")},
        {"norm_num_groups": 3},
        {"norm_num_groups": 0},
        {"block_out_channels": []},
        {"down_block_types": None},
        {"up_block_types": "UpDecoderBlock2D"},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        AutoencoderKLConfig.from_json(tiny.VAE | change)
    assert len(str(error.value).splitlines()) == 1


def test_fields_without_an_effect_are_accepted_and_defaults_are_those_of_diffusers():
    config = AutoencoderKLConfig.from_json({"force_upcast": True, "_diffusers_version": "0.6.0"})
    assert config == AutoencoderKLConfig()
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(
            diffusers.AutoencoderKL.__init__
        ).parameters.items()
    }
    for name, value in dataclasses.asdict(config).items():
        assert value == defaults[name], name
