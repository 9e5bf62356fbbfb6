"""Every layer of the UNet and the whole of it against diffusers, forward and backward."""

import diffusers.models.attention as torch_attention
import diffusers.models.embeddings as torch_embeddings
import diffusers.models.resnet as torch_resnet
import diffusers.models.unets.unet_2d_blocks as torch_blocks
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D as TorchDownsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel as TorchTransformer2D
from diffusers.models.upsampling import Upsample2D as TorchUpsample2D
from flax import nnx
from parity import normal

from r0_jax.errors import InputError
from r0_jax.models import unet_2d_blocks
from r0_jax.models.attention import GEGLU, Attention, FeedForward
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.models.autoencoder_tiny import AutoencoderTinyConfig
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.embeddings import TimestepEmbedding, sinusoidal
from r0_jax.models.normalization import GroupNorm, LayerNorm
from r0_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from r0_jax.models.transformer_2d import BasicTransformerBlock, Transformer2DModel
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.weights.network import Network

SMALL = 1e-3  # inputs of parts with a norm: at this scale a wrong epsilon shows


def check(torch_module, constructor, *inputs, ours=None, theirs=None, quiet=()):
    """Compares `__call__`s, or `ours(module, params, *inputs)` and `theirs(module, *inputs)`."""
    tiny.randomize(torch_module, seed=0)
    parity.quieten(torch_module, *quiet)
    network = parity.part(constructor)
    parity.compare(
        network if ours is None else lambda *args: ours(network, *args),
        parity.params_of(torch_module, network.shapes),
        torch_module if theirs is None else lambda *args: theirs(torch_module, *args),
        *inputs,
    )


# --- parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, outputs", [(8, 8), (8, 12)])
def test_resnet_block(inputs, outputs):
    check(
        torch_resnet.ResnetBlock2D(
            in_channels=inputs, out_channels=outputs, temb_channels=20, groups=4, eps=1e-5
        ),
        lambda rngs: ResnetBlock2D(
            inputs, outputs, time_embed_dim=20, norm_num_groups=4, norm_eps=1e-5, rngs=rngs
        ),
        SMALL * normal(0, 2, 5, 4, inputs),
        normal(1, 2, 20),
    )


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("height, width", [(8, 6), (9, 7)])
def test_downsample(height, width, padding):
    check(
        TorchDownsample2D(8, use_conv=True, padding=padding, name="op"),
        lambda rngs: Downsample2D(8, padding=padding, rngs=rngs),
        normal(0, 2, height, width, 8),
    )


@pytest.mark.parametrize("size", [None, (6, 8), (5, 7), (6, 7)])
def test_upsample(size):
    check(
        TorchUpsample2D(8, use_conv=True),
        lambda rngs: Upsample2D(8, rngs=rngs),
        normal(0, 2, 3, 4, 8),
        ours=lambda network, params, x: network(params, x, size=size),
        theirs=lambda module, x: module(x, output_size=size),
    )


def test_norms_of_numbers_far_from_zero():
    """Where the mean is 30 deviations, flax's own variance would be off by 1e-4; torch, whose
    float32 is off by 4e-5 too, says in float64 what is right."""
    far = 30 + normal(0, 2, 5, 4, 8)
    norm = GroupNorm(8, num_groups=4, epsilon=1e-5, rngs=nnx.Rngs(0))
    expected = torch.nn.functional.group_norm(parity.to_torch(far).double(), 4)
    parity.assert_close(norm(far), parity.to_jax(expected), parity.OUTPUT, "GroupNorm")
    norm = LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0))
    expected = torch.nn.functional.layer_norm(torch.tensor(far).double(), (8,))
    parity.assert_close(norm(far), expected, parity.OUTPUT, "LayerNorm")


@pytest.mark.parametrize(
    "build",
    [
        lambda rngs: UNet2DConditionModel(UNet2DConditionConfig.from_json(tiny.UNET), rngs=rngs),
        lambda rngs: AutoencoderKL(AutoencoderKLConfig.from_json(tiny.VAE), rngs=rngs),
        lambda rngs: CLIPModel(
            CLIPConfig.from_json({"text_config": tiny.TEXT, "vision_config": tiny.VISION}),
            rngs=rngs,
        ),
    ],
    ids=["unet", "vae", "clip"],
)
def test_every_norm_is_one_of_them(build):
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    norms = [
        node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.GroupNorm | nnx.LayerNorm)
    ]
    assert len(norms) > 10 and not any(norm.use_fast_variance for norm in norms)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("context", [None, 12])
def test_attention(heads, context):
    inputs = [normal(0, 2, 6, 16)] + ([normal(1, 2, 5, context)] if context else [])
    check(
        TorchAttention(16, cross_attention_dim=context, heads=heads, dim_head=16 // heads),
        lambda rngs: Attention(16, heads, cross_attention_dim=context, rngs=rngs),
        *inputs,
    )


def test_attention_with_a_bias_of_the_projections():
    check(
        TorchAttention(16, heads=2, dim_head=8, bias=True),
        lambda rngs: Attention(16, 2, qkv_bias=True, rngs=rngs),
        normal(0, 2, 6, 16),
    )


def test_feed_forward():
    check(torch_attention.GEGLU(8, 12), lambda rngs: GEGLU(8, 12, rngs=rngs), normal(0, 2, 3, 8))
    check(
        torch_attention.FeedForward(8, activation_fn="geglu"),
        lambda rngs: FeedForward(8, rngs=rngs),
        normal(0, 2, 3, 8),
    )


def test_transformer_block():
    check(
        torch_attention.BasicTransformerBlock(16, 4, 4, cross_attention_dim=12),
        lambda rngs: BasicTransformerBlock(16, 4, 12, rngs=rngs),
        SMALL * normal(0, 2, 6, 16),
        normal(1, 2, 5, 12),
        theirs=lambda module, x, context: module(x, encoder_hidden_states=context),
        quiet=("attn1.to_out", "attn2.to_out", "ff.net.2"),
    )


# 3 heads of 5 channels each: the blocks between the projections are 15 wide.
@pytest.mark.parametrize(
    "linear, heads, depth", [(False, 2, 1), (True, 4, 2), (False, 3, 1), (True, 3, 1)]
)
def test_transformer(linear, heads, depth):
    check(
        TorchTransformer2D(
            heads,
            16 // heads,
            in_channels=16,
            num_layers=depth,
            norm_num_groups=4,
            cross_attention_dim=12,
            use_linear_projection=linear,
        ),
        lambda rngs: Transformer2DModel(
            16, heads, depth, 12, norm_num_groups=4, use_linear_projection=linear, rngs=rngs
        ),
        SMALL * normal(0, 2, 3, 5, 16),
        normal(1, 2, 5, 12),
        theirs=lambda module, x, context: module(x, context, return_dict=False)[0],
    )


@pytest.mark.parametrize("channels", [8, 9])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 0.5])
def test_sinusoids(channels, flip, shift):
    timesteps = np.array([0.0, 1.0, 499.5, 999.0], np.float32)
    ours = sinusoidal(jnp.asarray(timesteps), channels, flip_sin_to_cos=flip, freq_shift=shift)
    theirs = torch_embeddings.get_timestep_embedding(
        torch.tensor(timesteps), channels, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    # exp and sin of numbers up to 999 round differently.
    parity.assert_close(ours, theirs, 1e-4)


def test_timestep_embedding():
    check(
        torch_embeddings.TimestepEmbedding(8, 20),
        lambda rngs: TimestepEmbedding(8, 20, rngs=rngs),
        normal(0, 2, 8),
    )


# --- the whole, and its blocks --------------------------------------------------------------

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def fields(*kinds, **others):
    """Config fields of levels of these kinds."""
    return {
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
        **others,
    }


CONFIGS = {
    # As SD 1.5: convolutional projections, the last level without attention. Odd sizes, and an
    # odd number of channels, which pads the sinusoids.
    "sd15": (
        fields(CROSS, PLAIN, block_out_channels=(9, 18), norm_num_groups=3, attention_head_dim=3),
        (9, 7),
    ),
    # As SDXL: linear projections, heads and depth of each level its own.
    "sdxl": (
        fields(
            PLAIN,
            CROSS,
            CROSS,
            block_out_channels=(8, 16, 24),
            use_linear_projection=True,
            attention_head_dim=(1, 2, 3),
            transformer_layers_per_block=(1, 1, 2),
        ),
        (8, 4),
    ),
    # Each field away from its default, and each level with its own number of layers.
    "others": (
        fields(
            PLAIN,
            CROSS,
            layers_per_block=(2, 1),
            in_channels=9,
            out_channels=3,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_num_groups=2,
            norm_eps=1e-2,
            cross_attention_dim=(10, 10),
            downsample_padding=0,
            attention_head_dim=4,
            act_fn="swish",
        ),
        (7, 10),
    ),
}

SINGLE = fields(CROSS, block_out_channels=(8,), transformer_layers_per_block=2)


def twins(**fields):
    """A torch UNet and ours, with the same weights, by way of the JSON config."""
    module = tiny.unet(seed=0, **fields)
    config = UNet2DConditionConfig.from_json(module.config)
    network = Network.abstract(lambda rngs: UNet2DConditionModel(config, rngs=rngs))
    return module, network, parity.params_of(module, network.shapes)


def inputs(config, height, width):
    timesteps = np.array([0.0, 703.25], np.float32)
    return (
        normal(0, 2, height, width, config.in_channels),
        timesteps,
        normal(1, 2, 5, config.cross_attention_dim),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_unet(name):
    overrides, size = CONFIGS[name]
    module, network, params = twins(**overrides)
    latents, timesteps, prompt_embeds = inputs(network.config, *size)
    parity.compare(
        lambda params, latents, prompt_embeds: network(
            params, latents, jnp.asarray(timesteps), prompt_embeds
        ),
        params,
        lambda latents, prompt_embeds: (
            module(latents, torch.tensor(timesteps), prompt_embeds).sample
        ),
        latents,
        prompt_embeds,
    )


def test_mid_features():
    module, network, params = twins(**SINGLE)
    latents, timesteps, prompt_embeds = inputs(network.config, 5, 4)
    features = []
    module.mid_block.register_forward_hook(lambda *args: features.append(args[-1]))

    def theirs(latents, prompt_embeds):
        module(latents, torch.tensor(timesteps), prompt_embeds)
        return features.pop()

    parity.compare(
        lambda params, latents, prompt_embeds: network.apply(
            params, "mid_features", latents, jnp.asarray(timesteps), prompt_embeds
        ),
        params,
        theirs,
        latents,
        prompt_embeds,
    )


TIME, CONTEXT = normal(2, 2, 32), normal(3, 2, 5, 16)
COMMON = {"heads": 2, "config": UNet2DConditionConfig.from_json(tiny.UNET)}
TORCH_COMMON = {"temb_channels": 32, "num_layers": 2, "resnet_eps": 1e-5, "resnet_groups": 4}
TORCH_ATTENDS = {"num_attention_heads": 2, "cross_attention_dim": 16}


@pytest.mark.parametrize("attends, downsamples", [(True, True), (False, False)])
def test_down_block(attends, downsamples):
    fields = TORCH_COMMON | {"in_channels": 8, "out_channels": 16, "add_downsample": downsamples}
    module = (
        torch_blocks.CrossAttnDownBlock2D(
            **fields, **TORCH_ATTENDS, transformer_layers_per_block=[2, 1]
        )
        if attends
        else torch_blocks.DownBlock2D(**fields)
    )
    context = torch.tensor(CONTEXT)
    check(
        module,
        lambda rngs: unet_2d_blocks.DownBlock(
            [(8, 16), (16, 16)],
            depths=(2, 1),
            downsamples=downsamples,
            attends=attends,
            rngs=rngs,
            **COMMON,
        ),
        normal(0, 2, 5, 7, 8),
        TIME,
        ours=lambda network, params, x, t: network(params, x, t, jnp.asarray(CONTEXT)),
        theirs=lambda module, x, t: module(x, t, *[context] * attends),
    )


@pytest.mark.parametrize("attends, size", [(True, (6, 8)), (False, (5, 7)), (False, None)])
def test_up_block(attends, size):
    fields = TORCH_COMMON | {
        "in_channels": 8,
        "out_channels": 16,
        "prev_output_channel": 12,
        "add_upsample": size is not None,
    }
    module = (
        torch_blocks.CrossAttnUpBlock2D(**fields, **TORCH_ATTENDS)
        if attends
        else torch_blocks.UpBlock2D(**fields)
    )
    context = {"encoder_hidden_states": torch.tensor(CONTEXT)} if attends else {}
    # What an earlier level left on the stack says how large the upsampled map is to be.
    below = [] if size is None else [jnp.zeros((2, *size, 8))]
    check(
        module,
        lambda rngs: unet_2d_blocks.UpBlock(
            [(12 + 16, 16), (16 + 8, 16)],
            depths=(1, 1),
            upsamples=size is not None,
            attends=attends,
            rngs=rngs,
            **COMMON,
        ),
        normal(0, 2, 3, 4, 12),
        TIME,
        normal(4, 2, 3, 4, 8),
        normal(5, 2, 3, 4, 16),
        ours=lambda network, params, x, t, *skips: network(
            params, x, [*below, *skips], t, jnp.asarray(CONTEXT)
        ),
        theirs=lambda module, x, t, *skips: module(x, skips, temb=t, upsample_size=size, **context),
    )


def test_mid_block():
    check(
        torch_blocks.UNetMidBlock2DCrossAttn(
            16, 32, resnet_eps=1e-5, resnet_groups=4, **TORCH_ATTENDS
        ),
        lambda rngs: unet_2d_blocks.MidBlock(16, depth=1, rngs=rngs, **COMMON),
        normal(0, 2, 3, 4, 16),
        TIME,
        CONTEXT,
        theirs=lambda module, x, t, context: module(x, t, encoder_hidden_states=context),
    )


# --- precision, and what is refused ----------------------------------------------------------


def test_bfloat16():
    module, network, params = twins(**SINGLE)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    latents, timesteps, prompt_embeds = inputs(network.config, 8, 8)
    expected = module(*map(parity.to_torch, (latents, timesteps, prompt_embeds)))
    args = (
        params,
        jnp.asarray(latents, jnp.bfloat16),
        jnp.asarray(timesteps),
        jnp.asarray(prompt_embeds, jnp.bfloat16),
    )
    output = jax.jit(network)(*args)
    assert output.dtype == jnp.bfloat16
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected.sample), 1e-1, "output")
    # Norms, softmax (and sinusoids) are float32, the bulk of the work is not.
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}, "conv_general_dilated": {"bfloat16"}}
    assert parity.input_dtypes(network, *args, primitives=list(expected)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"class_embed_type": "of_tomorrow"},
        {"class_embed_type": "projection"},
        {"class_embeddings_concat": True},
        {
            "class_embeddings_concat": True,
            "class_embed_type": "timestep",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 48,
        },
        {"cross_attention_dim": [16, 8]},
        {"cross_attention_dim": [16]},
        {"cross_attention_dim": [0, 0]},
        {"addition_embed_type": "text"},
        {"addition_embed_type": "text_time"},
        {"addition_time_embed_dim": 0},
        {"num_class_embeds": 0},
        {"encoder_hid_dim": 4},
        {"dual_cross_attention": True},
        {"resnet_time_scale_shift": "spatial"},
        {"time_cond_proj_dim": -1},
        *({"sample_size": value} for value in (0, -8, [8, 0], [-8, 8], [8], [8, 8, 8], "8", 8.0)),
        {"conv_in_kernel": 1},
        {"only_cross_attention": [True]},
        {"only_cross_attention": 1},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
        {"down_block_types": ["DownBlock2D"]},
        {"up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"]},
        {"attention_head_dim": [1, 2, 4]},
        {"attention_head_dim": 0},
        {"attention_head_dim": [9, 2]},
        {"attention_head_dim": [2, 17]},
        {"norm_num_groups": 3},
        {"norm_num_groups": -4},
        {"block_out_channels": []},
        {"block_out_channels": [0, 16]},
        {"layers_per_block": [1, 0]},
        {"in_channels": True},
        {"layers_per_block": [1]},
        {"transformer_layers_per_block": [1, -1]},
        {"transformer_layers_per_block": [[1, 2], [1, 2]]},
        # One of them is not enough where the way up has a layer more.
        {"reverse_transformer_layers_per_block": None, "transformer_layers_per_block": [[1], [1]]},
        {"reverse_transformer_layers_per_block": [1]},
        {"reverse_transformer_layers_per_block": [[1, 1], [1]]},
        {"reverse_transformer_layers_per_block": 1},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        UNet2DConditionConfig.from_json(tiny.UNET | change)
    assert len(str(error.value).splitlines()) == 1


def test_fields_of_an_average_of_weights_say_nothing_of_the_network():
    """EMAModel of diffusers writes them into the config.json of unet_ema."""
    average = {
        "decay": 0.9999,
        "inv_gamma": 1.0,
        "min_decay": 0.0,
        "optimization_step": 1,
        "power": 2 / 3,
        "update_after_step": 0,
        "use_ema_warmup": False,
    }
    for config, fields in (
        (UNet2DConditionConfig, tiny.UNET),
        (AutoencoderKLConfig, {}),
        (AutoencoderTinyConfig, {}),
        (SD3Transformer2DConfig, {}),
    ):
        assert config.from_json(fields | average) == config.from_json(fields)
