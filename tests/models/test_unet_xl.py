"""The UNet as SDXL has it, and the variants that few published folders have, against diffusers."""

import pathlib

import diffusers
import diffusers.models.attention as torch_attention
import diffusers.models.embeddings as torch_embeddings
import diffusers.models.resnet as torch_resnet
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from parity import normal
from published import config_of

from r0_jax.files import read_json
from r0_jax.models.embeddings import TimestepEmbedding
from r0_jax.models.resnet import ResnetBlock2D
from r0_jax.models.transformer_2d import BasicTransformerBlock
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.weights import convert
from r0_jax.weights.network import Network

DATA = pathlib.Path(__file__).parents[1] / "data"
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
STEM = "diffusion_pytorch_model"


def fields(*kinds, **others):
    """Config fields of levels of these kinds."""
    return {
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
        **others,
    }


def network_of(config_fields) -> Network:
    config = UNet2DConditionConfig.from_json(config_fields)
    return Network.abstract(lambda rngs: UNet2DConditionModel(config, rngs=rngs))


def twins(folder, **config_fields):
    """A torch UNet and ours, with the weights of the file that it writes."""
    module = tiny.unet(seed=0, **config_fields)
    module.save_pretrained(folder)
    network = network_of(read_json(folder / "config.json"))
    return module, network, convert.load(convert.find_files(folder, STEM), network)


# --- parts -------------------------------------------------------------------------------


def test_resnet_block_that_the_time_scales_and_shifts():
    module = tiny.randomize(
        torch_resnet.ResnetBlock2D(
            in_channels=8,
            out_channels=12,
            temb_channels=20,
            groups=4,
            eps=1e-5,
            time_embedding_norm="scale_shift",
        ),
        seed=0,
    )
    network = parity.part(
        lambda rngs: ResnetBlock2D(
            8,
            12,
            time_embed_dim=20,
            norm_num_groups=4,
            norm_eps=1e-5,
            time_scale_shift=True,
            rngs=rngs,
        )
    )
    parity.compare(
        network,
        parity.params_of(module, network.shapes),
        module,
        1e-3 * normal(0, 2, 5, 4, 8),
        normal(1, 2, 20),
    )


def test_transformer_block_that_sees_the_prompt_only():
    module = tiny.randomize(
        torch_attention.BasicTransformerBlock(
            16, 4, 4, cross_attention_dim=12, only_cross_attention=True
        ),
        seed=0,
    )
    network = parity.part(
        lambda rngs: BasicTransformerBlock(16, 4, 12, only_cross_attention=True, rngs=rngs)
    )
    parity.compare(
        network,
        parity.params_of(module, network.shapes),
        lambda x, context: module(x, encoder_hidden_states=context),
        1e-3 * normal(0, 2, 6, 16),
        normal(1, 2, 5, 12),
    )


def test_timestep_embedding_with_a_condition():
    module = tiny.randomize(torch_embeddings.TimestepEmbedding(8, 20, cond_proj_dim=6), seed=0)
    network = parity.part(lambda rngs: TimestepEmbedding(8, 20, cond_proj_dim=6, rngs=rngs))
    params = parity.params_of(module, network.shapes)
    parity.compare(network, params, module, normal(0, 2, 8), normal(1, 2, 6))
    parity.compare(network, params, module, normal(0, 2, 8))


# --- the whole -----------------------------------------------------------------------------

TIME_IDS = np.array([[1024, 768, 0, 16, 512, 640], [512, 512, 8, 0, 1024, 1024]], np.float32)
SDXL = fields(
    PLAIN,
    CROSS,
    use_linear_projection=True,
    attention_head_dim=(1, 2),
    transformer_layers_per_block=(1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=48,
)
SINGLE = fields(PLAIN, block_out_channels=(8,))
VARIANTS = {  # config fields, what the network is told besides
    "sdxl": (SDXL, {"pooled_prompt_embeds": normal(2, 2, 12), "add_time_ids": TIME_IDS}),
    "scale_shift": (
        fields(CROSS, CROSS, resnet_time_scale_shift="scale_shift", only_cross_attention=True),
        {},
    ),
    "asymmetric": (
        fields(
            CROSS,
            CROSS,
            layers_per_block=(1, 2),
            mid_block_type="UNetMidBlock2D",
            only_cross_attention=(False, True),
            transformer_layers_per_block=(1, (2, 0)),
            reverse_transformer_layers_per_block=((1, 0, 2), (2, 1)),
        ),
        {},
    ),
    "nested_mid": (
        fields(
            CROSS,
            transformer_layers_per_block=((2,),),
            block_out_channels=(8,),
            reverse_transformer_layers_per_block=(1,),
        ),
        {},
    ),
    "no_mid": (
        fields(CROSS, block_out_channels=(8,), mid_block_type=None, time_cond_proj_dim=7),
        {"timestep_cond": normal(2, 2, 7)},
    ),
    "without_condition": (SINGLE | {"time_cond_proj_dim": 7}, {}),
    "classes": (SINGLE | {"num_class_embeds": 5}, {"class_labels": np.array([4, 0], np.int32)}),
    "timestep": (
        SINGLE | {"class_embed_type": "timestep", "num_class_embeds": 5},
        {"class_labels": np.array([4, 703], np.int32)},
    ),
    "identity": (SINGLE | {"class_embed_type": "identity"}, {"class_labels": normal(2, 2, 32)}),
    "projection": (
        SINGLE | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
        {"class_labels": normal(2, 2, 6)},
    ),
    "beside": (
        fields(
            PLAIN,
            CROSS,
            class_embed_type="projection",
            class_embeddings_concat=True,
            projection_class_embeddings_input_dim=6,
        ),
        {"class_labels": normal(2, 2, 6)},
    ),
    "simple_projection": (
        SINGLE
        | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6},
        {"class_labels": normal(2, 2, 6)},
    ),
}
TIMESTEPS = np.array([0.0, 703.25], np.float32)


def inputs(network):
    return normal(0, 2, 6, 4, 4), normal(1, 2, 5, network.config.cross_attention_dim)


def as_diffusers_says(conditions):
    conditions = dict(conditions)
    added = {
        "text_embeds": conditions.pop("pooled_prompt_embeds", None),
        "time_ids": conditions.pop("add_time_ids", None),
    }
    return conditions | {"added_cond_kwargs": added}


@pytest.mark.parametrize("name", VARIANTS)
def test_unet(name, tmp_path):
    config_fields, conditions = VARIANTS[name]
    module, network, params = twins(tmp_path, **config_fields)
    # Sizes of images are no input to pull back to.
    given = {key: value for key, value in conditions.items() if key == "add_time_ids"}
    names = [key for key in conditions if key not in given]

    def ours(params, latents, prompt_embeds, *values):
        rest = {key: jnp.asarray(value) for key, value in given.items()}
        return network(
            params,
            latents,
            jnp.asarray(TIMESTEPS),
            prompt_embeds,
            **dict(zip(names, values, strict=True)),
            **rest,
        )

    def theirs(latents, prompt_embeds, *values):
        rest = {key: torch.tensor(value) for key, value in given.items()}
        told = as_diffusers_says(dict(zip(names, values, strict=True)) | rest)
        return module(latents, torch.tensor(TIMESTEPS), prompt_embeds, **told).sample

    parity.compare(ours, params, theirs, *inputs(network), *(conditions[key] for key in names))


def test_mid_features_are_told_as_much(tmp_path):
    config_fields, conditions = VARIANTS["sdxl"]
    module, network, params = twins(tmp_path, **config_fields)
    features = []
    module.mid_block.register_forward_hook(lambda *args: features.append(args[-1]))
    latents, prompt_embeds = inputs(network)
    with torch.no_grad():
        module(
            parity.to_torch(latents),
            torch.tensor(TIMESTEPS),
            torch.tensor(prompt_embeds),
            **as_diffusers_says({k: torch.tensor(v) for k, v in conditions.items()}),
        )
    run = jax.jit(lambda *args, **kwargs: network.apply(params, "mid_features", *args, **kwargs))
    parity.assert_close(
        run(latents, TIMESTEPS, prompt_embeds, **conditions),
        parity.to_jax(features[0]),
        parity.OUTPUT,
    )


def test_bfloat16():
    config_fields, conditions = VARIANTS["sdxl"]
    network = network_of(tiny.unet(**config_fields).config)
    params = {
        name: jax.ShapeDtypeStruct(struct.shape, jnp.bfloat16)
        for name, struct in network.shapes.items()
    }
    latents, prompt_embeds = (jnp.asarray(x, jnp.bfloat16) for x in inputs(network))
    conditions = {
        "pooled_prompt_embeds": jnp.zeros((2, 12), jnp.bfloat16),
        "add_time_ids": jnp.asarray(conditions["add_time_ids"]),
    }

    def run(params):
        return network(params, latents, jnp.asarray(TIMESTEPS), prompt_embeds, **conditions)

    assert jax.eval_shape(run, params).dtype == jnp.bfloat16
    expected = {
        "sin": {"float32"},
        "rsqrt": {"float32"},
        "exp": {"float32"},
        "conv_general_dilated": {"bfloat16"},
    }
    assert parity.input_dtypes(run, params, primitives=list(expected)) == expected


@pytest.mark.parametrize(
    "name, missing",
    [("sdxl", "pooled_prompt_embeds and add_time_ids"), ("classes", "class_labels")],
)
def test_what_the_network_must_be_told(name, missing):
    network = network_of(tiny.unet(**VARIANTS[name][0]).config)
    latents, prompt_embeds = map(jnp.asarray, inputs(network))
    with pytest.raises(ValueError, match=f"asks for {missing} as well"):
        jax.eval_shape(
            lambda params: network(params, latents, jnp.asarray(TIMESTEPS), prompt_embeds),
            network.shapes,
        )


def test_round_trip_is_exact(tmp_path):
    parity.assert_round_trip(twins(tmp_path, **SDXL)[-1], tmp_path, diffusers.UNet2DConditionModel)


def test_embedded_guidance_adds_one_key_to_the_published_file():
    """LCM's UNet is that of Stable Diffusion 1.5 and one projection more."""
    network = network_of(config_of("lcm-dreamshaper-v7-unet"))
    published = set(read_json(DATA / "keys" / "sd15_unet.json")["keys"])
    assert {convert.to_key(name) for name in network.shapes} - published == {
        "time_embedding.cond_proj.weight"
    }
    assert network.shapes["time_embedding.cond_proj.kernel"].shape == (256, 320)
