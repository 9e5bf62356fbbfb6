"""Every layer of SD3's transformer and the whole of it against diffusers, forward and backward."""

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
import torch
from diffusers import SD3Transformer2DModel as TorchSD3
from diffusers.models.attention import FeedForward as TorchFeedForward
from diffusers.models.attention import JointTransformerBlock as TorchBlock
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings as TorchEmbeddings
from diffusers.models.embeddings import PatchEmbed as TorchPatchEmbed
from parity import normal
from published import config_of

from r0_jax.errors import InputError
from r0_jax.files import read_json
from r0_jax.models import transformer_sd3
from r0_jax.models.attention import GELU, FeedForward
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig, SD3Transformer2DModel
from r0_jax.weights import convert
from r0_jax.weights.network import Network, init

DATA = pathlib.Path(__file__).parents[1] / "data"
STEM = "diffusion_pytorch_model"
SMALL = 1e-3  # inputs of parts with a norm: at this scale a wrong epsilon shows

TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 6,
}
CONFIG = SD3Transformer2DConfig.from_json(TRANSFORMER)
NORMED = SD3Transformer2DConfig.from_json(TRANSFORMER | {"qk_norm": "rms_norm"})


def check(torch_module, constructor, *inputs, theirs=None, quiet=()):
    tiny.randomize(torch_module, seed=0)
    parity.quieten(torch_module, *quiet)
    network = parity.part(constructor)
    parity.compare(
        network,
        parity.params_of(torch_module, network.shapes),
        torch_module if theirs is None else lambda *args: theirs(torch_module, *args),
        *inputs,
    )


# --- parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(12, 12), (6, 10), (7, 5)])
def test_patches_have_their_place_in_the_middle_of_the_table(height, width):
    check(
        TorchPatchEmbed(
            height=8, width=8, patch_size=2, in_channels=4, embed_dim=16, pos_embed_max_size=6
        ),
        lambda rngs: transformer_sd3.PatchEmbed(CONFIG, rngs=rngs),
        normal(0, 2, height, width, 4),
        theirs=lambda module, x: module(x).mT.unflatten(2, (height // 2, width // 2)),
    )


def test_conditioning():
    timesteps = np.array([0.0, 703.25])
    module = tiny.randomize(TorchEmbeddings(16, 10), seed=0)
    network = parity.part(
        lambda rngs: transformer_sd3.CombinedTimestepTextProjEmbeddings(CONFIG, rngs=rngs)
    )
    parity.compare(
        lambda params, pooled: network(params, jnp.asarray(timesteps, jnp.float32), pooled),
        parity.params_of(module, network.shapes),
        lambda pooled: module(torch.tensor(timesteps), pooled),
        normal(0, 2, 10),
    )


def test_feed_forward():
    check(
        TorchFeedForward(8, activation_fn="gelu-approximate"),
        lambda rngs: FeedForward(8, activation=GELU, rngs=rngs),
        normal(0, 2, 5, 8),
    )


@pytest.mark.parametrize("config", [CONFIG, NORMED])
def test_self_attention(config):
    check(
        TorchAttention(
            16,
            heads=2,
            dim_head=8,
            bias=True,
            out_dim=16,
            eps=1e-6,
            qk_norm=config.qk_norm,
            processor=JointAttnProcessor2_0(),
        ),
        lambda rngs: transformer_sd3.SelfAttention(config, rngs=rngs),
        normal(0, 2, 5, 16),
        quiet=["to_q", "to_k"] if config.qk_norm else (),
    )


@pytest.mark.parametrize("config, last", [(CONFIG, False), (NORMED, False), (NORMED, True)])
def test_joint_attention(config, last):
    check(
        TorchAttention(
            16,
            added_kv_proj_dim=16,
            heads=2,
            dim_head=8,
            bias=True,
            out_dim=16,
            context_pre_only=last,
            qk_norm=config.qk_norm,
            eps=1e-6,
            processor=JointAttnProcessor2_0(),
        ),
        lambda rngs: transformer_sd3.JointAttention(config, context_pre_only=last, rngs=rngs),
        normal(0, 2, 5, 16),
        normal(1, 2, 3, 16),
        theirs=lambda module, *args: module(*args)[: 1 if last else 2],
        quiet=["to_q", "to_k", "add_q_proj", "add_k_proj"] if config.qk_norm else (),
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_block(last, dual):
    check(
        TorchBlock(16, 2, 8, context_pre_only=last, use_dual_attention=dual),
        lambda rngs: transformer_sd3.JointTransformerBlock(
            CONFIG, context_pre_only=last, dual_attention=dual, rngs=rngs
        ),
        SMALL * normal(0, 2, 5, 16),
        SMALL * normal(1, 2, 3, 16),
        normal(2, 2, 16),
        theirs=lambda module, *args: [x for x in module(*args)[::-1] if x is not None],
        # So that the second norm, too, sees small numbers.
        quiet=["attn.to_out", *["attn2.to_out"] * dual, *["attn.to_add_out"] * (not last)],
    )


# --- the whole ---------------------------------------------------------------------------

CONFIGS = {
    "sd3": ({"num_layers": 3}, (6, 10)),
    # As of SD3.5 large and medium.
    "sd3.5-large": ({"qk_norm": "rms_norm"}, (12, 12)),
    "sd3.5-medium": (
        {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
        (8, 4),
    ),
    # And what no published file has: the last block is dual, sizes that no patch divides.
    "dual-last": (
        {
            "dual_attention_layers": [1],
            "attention_head_dim": 4,
            "patch_size": 3,
            "num_attention_heads": 3,
            "caption_projection_dim": 12,
            "sample_size": 9,
            "out_channels": 5,
            "pos_embed_max_size": 5,
        },
        (7, 14),
    ),
    "single": ({"num_layers": 1, "patch_size": 1, "pos_embed_max_size": 9}, (5, 4)),
}


def abstract(fields):
    config = SD3Transformer2DConfig.from_json(fields)
    return Network.abstract(lambda rngs: SD3Transformer2DModel(config, rngs=rngs))


def twins(folder, **fields):
    """A torch transformer and ours, with the same weights, by way of diffusers' folder."""
    module = tiny.randomize(TorchSD3(**TRANSFORMER | fields), seed=0)
    # Not what either side would compute, so that it has to come from the file.
    module.pos_embed.pos_embed += 0.1 * torch.randn(
        module.pos_embed.pos_embed.shape, generator=torch.Generator().manual_seed(1)
    )
    module.save_pretrained(folder)
    network = abstract(read_json(folder / "config.json"))
    return module, network, convert.load(convert.find_files(folder, STEM), network)


TIMESTEPS = np.array([0.0, 703.25], np.float32)


def inputs(config, height, width):
    return (
        normal(0, 2, height, width, config.in_channels),
        normal(1, 2, 5, config.joint_attention_dim),
        normal(2, 2, config.pooled_projection_dim),
    )


def ours(network, method="__call__"):
    return lambda params, latents, *prompt: network.apply(
        params, method, latents, jnp.asarray(TIMESTEPS), *prompt
    )


def theirs(module):
    return lambda latents, *prompt: module(latents, *prompt, torch.tensor(TIMESTEPS)).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_transformer(name, tmp_path):
    fields, size = CONFIGS[name]
    module, network, params = twins(tmp_path, **fields)
    parity.compare(ours(network), params, theirs(module), *inputs(network.config, *size))


def test_mid_features(tmp_path):
    module, network, params = twins(tmp_path, num_layers=3)
    features = []
    module.transformer_blocks[1].register_forward_hook(lambda *args: features.append(args[-1][1]))

    def torch_features(*args):
        theirs(module)(*args)
        return features.pop().mT.unflatten(2, (3, 5))

    parity.compare(
        ours(network, "mid_features"), params, torch_features, *inputs(network.config, 6, 10)
    )


def test_what_is_made_here_loads_in_diffusers(tmp_path):
    fields = TRANSFORMER | {"qk_norm": "rms_norm", "dual_attention_layers": [0]}
    network = abstract(fields)
    params = init(lambda rngs: SD3Transformer2DModel(network.config, rngs=rngs), jax.random.key(0))
    parity.assert_close(
        params["pos_embed.pos_embed"], TorchSD3(**fields).pos_embed.pos_embed, 1e-5, "positions"
    )
    for i, (name, value) in enumerate(params.items()):
        if value.ndim == 1:  # which start at 0 and 1: one left out would not show
            params[name] = value + 0.3 * normal(i, *value.shape)
    convert.save(params, tmp_path / f"{STEM}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields), "utf-8")
    module, info = TorchSD3.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    parity.compare(ours(network), params, theirs(module), *inputs(network.config, 8, 8))


def test_larger_latents_than_the_table_are_refused():
    network = abstract(TRANSFORMER)
    args = inputs(network.config, 8, 14)
    with pytest.raises(InputError, match=r"4 x 7 patches .* pos_embed_max_size is 6"):
        jax.eval_shape(ours(network), network.shapes, *args)


def test_the_table_of_positions_gets_no_gradient(tmp_path):
    _, network, params = twins(tmp_path, num_layers=1)
    args = [jnp.asarray(x) for x in inputs(network.config, 4, 4)]
    gradient = jax.jit(jax.grad(lambda params: ours(network)(params, *args).sum()))(params)
    assert not gradient.pop("pos_embed.pos_embed").any()
    assert all(value.any() for name, value in gradient.items() if name.startswith("pos_embed."))


# --- published files ---------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_published_file():
    network = abstract(config_of("stable_diffusion_3/transformer"))
    published = read_json(DATA / "keys" / "sd3_transformer.json")
    assert file_shapes(network) == {k: tuple(v) for k, v in published["keys"].items()}
    assert sum(x.size for x in network.shapes.values()) == published["_num_elements"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
        },
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
    ],
    ids=["medium", "large"],
)
def test_names_and_shapes_of_sd3_5_are_those_of_diffusers(fields):
    fields = fields | {"qk_norm": "rms_norm"}
    with torch.device("meta"):
        module = TorchSD3(**fields)
    assert file_shapes(abstract(fields)) == {
        key: tuple(value.shape) for key, value in module.state_dict().items()
    }


def file_shapes(network):
    shapes = {}
    for name, struct in network.shapes.items():
        zeros = np.broadcast_to(np.float32(0), struct.shape)  # one number, whatever the shape
        shapes[convert.to_key(name)] = convert.to_checkpoint(name, zeros).shape
    return shapes


# --- precision, and what is refused ----------------------------------------------------------


def test_bfloat16(tmp_path):
    module, network, params = twins(tmp_path, qk_norm="rms_norm", dual_attention_layers=[0])
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    latents, *prompt = inputs(network.config, 8, 8)
    expected = theirs(module)(*map(parity.to_torch, (latents, *prompt)))
    args = (params, *(jnp.asarray(x, jnp.bfloat16) for x in (latents, *prompt)))
    output = jax.jit(ours(network))(*args)
    assert output.dtype == jnp.bfloat16
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected), 1e-1, "output")
    # Norms, softmax (and sinusoids) are float32, the bulk of the work is not.
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}, "dot_general": {"bfloat16"}}
    assert parity.input_dtypes(ours(network), *args, primitives=list(expected)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": "layer_norm"},
        {"qk_norm": True},
        {"dual_attention_layers": [2]},
        {"dual_attention_layers": [-1]},
        {"dual_attention_layers": 1},
        {"caption_projection_dim": 12},
        {"attention_head_dim": 3},
        {"attention_head_dim": 0},
        {"num_layers": 0},
        {"num_attention_heads": [2, 2]},
        {"in_channels": True},
        {"out_channels": None},
        {"pos_embed_max_size": None},
        {"pos_embed_max_size": 0},
        {"patch_size": 0},
        {"patch_size": "2"},
        {"sample_size": 1},
        {"joint_attention_dim": 1.5},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        SD3Transformer2DConfig.from_json(TRANSFORMER | change)
    assert len(str(error.value).splitlines()) == 1


def test_defaults_are_those_of_diffusers():
    config = SD3Transformer2DConfig.from_json({"_diffusers_version": "0.29.0.dev0"})
    assert config == SD3Transformer2DConfig()
    parameters = inspect.signature(TorchSD3.__init__).parameters
    defaults = {name: value.default for name, value in parameters.items() if name != "self"}
    assert dataclasses.asdict(config) == defaults
