"""Every layer of CLIP and both towers against transformers, forward and backward."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
import transformers
from parity import normal
from transformers.models.clip import modeling_clip as torch_clip

from r0_jax.errors import InputError
from r0_jax.models import clip
from r0_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)
from r0_jax.weights.network import Network

TEXT = tiny.TEXT | {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
VISION = tiny.VISION
BOTH = {"text_config": TEXT, "vision_config": VISION}


def check(torch_module, constructor, *inputs, theirs=None):
    tiny.randomize(torch_module, seed=0)
    network = parity.part(constructor)
    parity.compare(
        network,
        parity.params_of(torch_module, network.shapes),
        torch_module if theirs is None else theirs,
        *inputs,
    )


def ids(*rows):
    return np.array(rows, np.int32)


# --- parts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads, act, is_causal", [(1, "quick_gelu", True), (4, "gelu", False), (2, "gelu_new", True)]
)
def test_encoder_layer(heads, act, is_causal):
    fields = VISION | {"num_attention_heads": heads, "hidden_act": act, "layer_norm_eps": 1e-6}
    torch_config = transformers.CLIPVisionConfig(**fields)
    torch_config._attn_implementation = "sdpa"
    layer = tiny.randomize(torch_clip.CLIPEncoderLayer(torch_config), seed=0)
    parity.quieten(layer, "self_attn.out_proj", "mlp.fc2")
    network = parity.part(
        lambda rngs: clip.CLIPEncoderLayer(
            CLIPVisionConfig.from_json(fields), is_causal=is_causal, rngs=rngs
        )
    )
    parity.compare(
        network,
        parity.params_of(layer, network.shapes),
        lambda x: layer(x, None, is_causal=is_causal),
        1e-3 * normal(0, 2, 6, 16),
    )


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_mlp(act):
    fields = VISION | {"hidden_act": act}
    check(
        torch_clip.CLIPMLP(transformers.CLIPVisionConfig(**fields)),
        lambda rngs: clip.CLIPMLP(16, 32, act, rngs=rngs),
        3 * normal(0, 2, 3, 16),
    )


def test_vision_embeddings():
    config = CLIPVisionConfig.from_json(VISION)
    check(
        torch_clip.CLIPVisionEmbeddings(transformers.CLIPVisionConfig(**VISION)),
        lambda rngs: clip.CLIPVisionEmbeddings(config, rngs=rngs),
        normal(0, 2, 16, 16, 3),
    )


def test_vision_transformer():
    module = torch_clip.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    config = CLIPVisionConfig.from_json(VISION)
    check(
        module,
        lambda rngs: clip.CLIPVisionTransformer(config, rngs=rngs),
        normal(0, 2, 16, 16, 3),
        theirs=lambda images: module(images).pooler_output,
    )


# --- text towers ---------------------------------------------------------------------------

# In each: the first end, the highest id, the id 2 and the last token all differ in place.
PROMPTS = ids([48, 2, 7, 49, 0, 49, 5, 49], [48, 49, 9, 2, 49, 49, 49, 1])
TEXT_CONFIGS = {
    "quick_gelu": {},
    "gelu": {
        "hidden_act": "gelu",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "layer_norm_eps": 1e-3,
    },
    "max_id": {"eos_token_id": 2, "vocab_size": 60, "max_position_embeddings": 8},
    "other_end": {"eos_token_id": 9},
    "no_end": {"eos_token_id": 3},
}


@pytest.mark.parametrize("name", TEXT_CONFIGS)
@pytest.mark.parametrize("projected", [False, True])
def test_text_model(name, projected):
    """Outputs for token ids, and gradients with respect to the table of token embeddings."""
    fields = TEXT | TEXT_CONFIGS[name]
    ours, theirs = (
        (CLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection)
        if projected
        else (CLIPTextModel, transformers.CLIPTextModel)
    )
    module = tiny.randomize(theirs(transformers.CLIPTextConfig(**fields)), seed=0)
    config = CLIPTextConfig.from_json(module.config.to_dict())
    network = Network.abstract(lambda rngs: ours(config, rngs=rngs))
    # transformers 5 calls it `embeddings...` in a CLIPTextModel; the hub's files have the prefix.
    prefix = "text_model." * (not projected)
    params = parity.params_of(module, network.shapes, prefix)
    table = "text_model.embeddings.token_embedding."

    def run_ours(params, input_ids, values):
        return network(params | {table + "embedding": values}, input_ids)

    def run_theirs(input_ids, values):
        output = torch.func.functional_call(
            module,
            {table.removeprefix(prefix) + "weight": values},
            (input_ids,),
            {"output_hidden_states": True},
        )
        pooled = output.text_embeds if projected else output.pooler_output
        return output.last_hidden_state, pooled, output.hidden_states[-2]

    parity.compare(run_ours, params, run_theirs, PROMPTS, np.array(params[table + "embedding"]))


# --- both towers ----------------------------------------------------------------------------


def clip_twins(text=None, vision=None, **fields):
    torch_config = transformers.CLIPConfig(
        text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), **fields
    )
    module = tiny.randomize(transformers.CLIPModel(torch_config), seed=0)
    config = CLIPConfig.from_json(json.loads(torch_config.to_json_string()))
    network = Network.abstract(lambda rngs: CLIPModel(config, rngs=rngs))
    return module, network, parity.params_of(module, network.shapes)


@pytest.mark.parametrize(
    "fields",
    [
        {"projection_dim": 12},
        {
            "projection_dim": 10,
            "text": {"hidden_size": 8, "hidden_act": "gelu", "eos_token_id": 2},
            "vision": {
                "hidden_size": 24,
                "hidden_act": "gelu",
                "num_attention_heads": 3,
                "patch_size": 8,
                "num_hidden_layers": 1,
            },
        },
    ],
    ids=["openai", "laion"],
)
def test_clip_features_and_logits(fields):
    module, network, params = clip_twins(**fields)
    images = normal(0, 3, 16, 16, 3)

    def ours(params, images):
        return (
            network.apply(params, "text_features", jnp.asarray(PROMPTS)),
            network.apply(params, "image_features", images),
            network(params, jnp.asarray(PROMPTS), images),
        )

    def theirs(images):
        input_ids = torch.tensor(PROMPTS)
        return (
            module.get_text_features(input_ids).pooler_output,
            module.get_image_features(images).pooler_output,
            module(input_ids, images).logits_per_image,
        )

    parity.compare(ours, params, theirs, images)


def test_bfloat16():
    module, network, params = clip_twins()
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    images = normal(0, 2, 16, 16, 3)

    def features(params, images):
        return (
            network.apply(params, "text_features", jnp.asarray(PROMPTS)),
            network.apply(params, "image_features", images),
        )

    args = params, jnp.asarray(images, jnp.bfloat16)
    text, image = jax.jit(features)(*args)
    assert text.dtype == image.dtype == jnp.bfloat16
    expected = module.get_text_features(torch.tensor(PROMPTS)).pooler_output
    parity.assert_close(text.astype(jnp.float32), parity.to_jax(expected), 1e-1)
    expected = module.get_image_features(parity.to_torch(images)).pooler_output
    parity.assert_close(image.astype(jnp.float32), parity.to_jax(expected), 1e-1)
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}}
    assert parity.input_dtypes(features, *args, primitives=list(expected)) == expected


# --- configs --------------------------------------------------------------------------------


def test_defaults_are_those_of_transformers():
    for ours, theirs in [
        (CLIPTextConfig, transformers.CLIPTextConfig),
        (CLIPVisionConfig, transformers.CLIPVisionConfig),
    ]:
        for name, value in dataclasses.asdict(ours()).items():
            assert value == getattr(theirs(), name), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # A repetition in the file overrules, down to the defaults of what it leaves out.
        {"text_config_dict": {"hidden_size": 24}, "vision_config_dict": {"patch_size": 8}},
        {"text_config_dict": None, "vision_config_dict": None},
        {"text_config_dict": {}},
    ],
)
def test_config_of_a_clip_model(changes):
    fields = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 12} | changes
    config = CLIPConfig.from_json(fields)
    theirs = transformers.CLIPConfig.from_dict(copy.deepcopy(fields))  # it writes into its input
    assert config.projection_dim == theirs.projection_dim == 12
    for part in ("text_config", "vision_config"):
        for name, value in dataclasses.asdict(getattr(config, part)).items():
            assert value == getattr(getattr(theirs, part), name), name


def test_a_tower_reads_its_part_of_the_config_of_both(tmp_path):
    transformers.CLIPConfig(**copy.deepcopy(BOTH)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for ours, theirs in [
        (CLIPTextConfig, transformers.CLIPTextConfig),
        (CLIPVisionConfig, transformers.CLIPVisionConfig),
    ]:
        expected = theirs.from_pretrained(tmp_path)
        for name, value in dataclasses.asdict(ours.from_json(fields)).items():
            assert value == getattr(expected, name), name
    assert CLIPTextConfig.from_json(fields).hidden_size == TEXT["hidden_size"] != 512


@pytest.mark.parametrize(
    "parse, fields, said",
    [
        (CLIPTextConfig.from_json, TEXT | {"hidden_act": "mish"}, "hidden_act"),
        (CLIPVisionConfig.from_json, VISION | {"hidden_size": "16"}, "hidden_size"),
        (CLIPConfig.from_json, TEXT, "text_config"),
        (CLIPConfig.from_json, BOTH | {"text_config": None}, "text_config is a null"),
        (CLIPConfig.from_json, BOTH | {"vision_config": []}, "vision_config is a list"),
        (CLIPConfig.from_json, BOTH | {"text_config_dict": [1]}, "text_config is a list"),
        (CLIPTextConfig.from_json, {"text_config": 3}, "text_config is a int"),
        (CLIPTextConfig.from_json, TEXT | {"num_attention_heads": 3}, "num_attention_heads = 3"),
        (CLIPTextConfig.from_json, TEXT | {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (CLIPVisionConfig.from_json, VISION | {"patch_size": 0}, "patch_size = 0"),
        (CLIPVisionConfig.from_json, VISION | {"num_channels": True}, "num_channels = true"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(parse, fields, said):
    with pytest.raises(InputError, match=said) as error:
        parse(fields)
    assert len(str(error.value).splitlines()) == 1
