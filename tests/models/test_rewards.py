"""The reward networks: names and shapes of the published files, and PyTorch's numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
import torch_twins
import transformers
from parity import normal
from published import config_of
from reward_configs import CN_CLIP, IMAGE_REWARD, OPEN_CLIP

from r0_jax.errors import InputError
from r0_jax.models import chinese_clip, open_clip
from r0_jax.models.blip import ImageReward, ImageRewardConfig
from r0_jax.models.chinese_clip import CNCLIP, ChineseCLIPConfig, ChineseCLIPModel, CNCLIPConfig
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.open_clip import OpenCLIP, OpenCLIPConfig
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.weights import convert
from r0_jax.weights.network import Network

DATA = pathlib.Path(__file__).parents[1] / "data"
# The highest id ends a prompt; 0 are pads.
IDS = np.array([[1, 5, 7, 39, 0, 0], [1, 39, 0, 0, 0, 0], [1, 9, 8, 7, 6, 39]], np.int32)


def network_of(kind, config_class, fields):
    config = config_class.from_json(fields)
    return Network.abstract(lambda rngs: kind(config, rngs=rngs))


def keys_of(name):
    return json.loads((DATA / "keys" / f"{name}.json").read_text("utf-8"))["keys"]


@pytest.mark.parametrize(
    ("manifest", "network", "prefix"),
    [
        (
            "open_clip_ViT-H-14",
            lambda: network_of(OpenCLIP, OpenCLIPConfig, open_clip.ARCHITECTURES["ViT-H-14"]),
            "",
        ),
        (
            "open_clip_ViT-L-14",
            lambda: network_of(OpenCLIP, OpenCLIPConfig, open_clip.ARCHITECTURES["ViT-L-14"]),
            "",
        ),
        (
            "clip_h_hf_pickscore",
            lambda: network_of(CLIPModel, CLIPConfig, config_of("pickscore")),
            "",
        ),
        ("imagereward", lambda: network_of(ImageReward, ImageRewardConfig, {}), ""),
        (
            "cn_clip_vit-b-16",
            lambda: network_of(CNCLIP, CNCLIPConfig, chinese_clip.ARCHITECTURES["ViT-B-16"]),
            "module.",
        ),
        (
            "cn_clip_vit-l-14",
            lambda: network_of(CNCLIP, CNCLIPConfig, chinese_clip.ARCHITECTURES["ViT-L-14"]),
            "module.",
        ),
        (
            "cn_clip_vit-h-14",
            lambda: network_of(CNCLIP, CNCLIPConfig, chinese_clip.ARCHITECTURES["ViT-H-14"]),
            "module.",
        ),
        (
            "chinese_clip_hf_base-patch16",
            lambda: network_of(
                ChineseCLIPModel, ChineseCLIPConfig, config_of("chinese-clip-vit-base-patch16")
            ),
            "",
        ),
        (
            "chinese_clip_hf_large-patch14",
            lambda: network_of(
                ChineseCLIPModel, ChineseCLIPConfig, config_of("chinese-clip-vit-large-patch14")
            ),
            "",
        ),
        ("laion_aesthetic", lambda: Network.abstract(lambda rngs: ScoreMLP(768, rngs=rngs)), ""),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_names_and_shapes_of_the_published_file(manifest, network, prefix):
    ours = {
        convert.to_key(name): convert.file_shape(name, struct.shape)
        for name, struct in network().shapes.items()
    }
    theirs = {
        key.removeprefix(prefix): tuple(shape)
        for key, shape in keys_of(manifest).items()
        if not key.endswith("position_ids")
    }
    assert ours == theirs


def compare_features(network, module, images, params=None):
    def ours(params, images):
        return (
            network.apply(params, "text_features", jnp.asarray(IDS)),
            network.apply(params, "image_features", images),
        )

    def theirs(images):
        return module.text_features(torch.tensor(IDS)), module.image_features(images)

    parity.compare(ours, params or parity.params_of(module, network.shapes), theirs, images)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip(quick_gelu):
    fields = OPEN_CLIP | {"quick_gelu": quick_gelu}
    fields["text_cfg"] = fields["text_cfg"] | {"context_length": IDS.shape[1]}
    module = tiny.randomize(torch_twins.OpenCLIP(fields), seed=0)
    compare_features(network_of(OpenCLIP, OpenCLIPConfig, fields), module, normal(0, 3, 16, 16, 3))


def test_cn_clip():
    module = tiny.randomize(torch_twins.CNCLIP(CN_CLIP), seed=0)
    compare_features(network_of(CNCLIP, CNCLIPConfig, CN_CLIP), module, normal(0, 3, 16, 16, 3))


def test_chinese_clip_of_transformers():
    text = {k.removeprefix("text_"): v for k, v in CN_CLIP.items() if k.startswith("text_")}
    config = transformers.ChineseCLIPConfig(
        text_config=text | {"vocab_size": 40}, vision_config=tiny.VISION, projection_dim=12
    )
    config._attn_implementation = "eager"
    module = tiny.randomize(transformers.ChineseCLIPModel(config), seed=0)
    fields = json.loads(config.to_json_string())
    network = network_of(ChineseCLIPModel, ChineseCLIPConfig, fields)
    # The library builds a pooler that it never asks and that no file has.
    state = {k: v for k, v in module.state_dict().items() if ".pooler." not in k}
    state = {k: v.numpy() for k, v in state.items() if not k.endswith("_ids")}
    assert {convert.to_key(name) for name in network.shapes} == state.keys()
    params = {
        name: convert.from_checkpoint(name, state[convert.to_key(name)]) for name in network.shapes
    }

    class Features:
        @staticmethod
        def text_features(ids):
            hidden = module.text_model(ids, attention_mask=(ids != 0).long()).last_hidden_state
            return module.text_projection(hidden[:, 0])

        @staticmethod
        def image_features(images):
            return module.get_image_features(images).pooler_output

    compare_features(network, Features, normal(0, 3, 16, 16, 3), params)


def test_image_reward():
    module = tiny.randomize(torch_twins.ImageReward(*IMAGE_REWARD.values()), seed=0)
    network = network_of(ImageReward, ImageRewardConfig, IMAGE_REWARD)
    parity.compare(
        lambda params, images: network(params, jnp.asarray(IDS), images),
        parity.params_of(module, network.shapes),
        lambda images: module(torch.tensor(IDS), images),
        normal(0, 3, 16, 16, 3),
    )


def test_image_reward_computes_in_bfloat16_and_scores_in_float32():
    network = network_of(ImageReward, ImageRewardConfig, IMAGE_REWARD)
    shapes = {
        k: jax.ShapeDtypeStruct(v.shape, jnp.float32 if k.startswith("mlp.") else jnp.bfloat16)
        for k, v in network.shapes.items()
    }
    images = jax.ShapeDtypeStruct((3, 16, 16, 3), jnp.bfloat16)
    assert jax.eval_shape(network, shapes, IDS, images).dtype == jnp.float32
    found = parity.input_dtypes(
        network, shapes, IDS, images, primitives=["conv_general_dilated", "exp", "rsqrt"]
    )
    assert found == {"conv_general_dilated": {"bfloat16"}, "exp": {"float32"}, "rsqrt": {"float32"}}


@pytest.mark.parametrize(
    ("parse", "fields", "said"),
    [
        (OpenCLIPConfig, {}, "embed_dim is missing"),
        (OpenCLIPConfig, OPEN_CLIP | {"vision_cfg": "ViT"}, "vision_cfg is not an object"),
        (
            OpenCLIPConfig,
            OPEN_CLIP | {"custom_text": True},
            "'custom_text' = true is not supported",
        ),
        (OpenCLIPConfig, OPEN_CLIP | {"vision_cfg": {"timm_model_name": "x"}}, "'timm_model_name'"),
        (OpenCLIPConfig, OPEN_CLIP | {"text_cfg": {"heads": 3}}, "width = 512 is not a multiple"),
        (OpenCLIPConfig, OPEN_CLIP | {"vision_cfg": {"layers": 0}}, "layers = 0"),
        (CNCLIPConfig, {"embed_dim": 3}, "vision_width is missing"),
        (CNCLIPConfig, CN_CLIP | {"text_num_attention_heads": 3}, "num_attention_heads = 3"),
        (ChineseCLIPConfig, {"text_config": {}}, "vision_config is missing"),
        (ImageRewardConfig, {"vision_config": 3}, "must be objects"),
        (
            ImageRewardConfig,
            {"vision_config": {"heads": 3}},
            "heads = 3 does not divide width = 1024",
        ),
        (ImageRewardConfig, {"vision_config": {"depth": 3}}, "'depth' = 3 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(parse, fields, said):
    with pytest.raises(InputError, match=said) as error:
        parse.from_json(fields)
    assert len(str(error.value).splitlines()) == 1
