"""Qwen3 as a text encoder against transformers, layer by layer, forward and backward."""

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
from safetensors.numpy import load_file, save_file
from transformers.models.qwen3 import modeling_qwen3

from r0_jax.errors import InputError
from r0_jax.models import qwen3
from r0_jax.models.embeddings import rotary_angles
from r0_jax.models.qwen3 import Qwen3Config, Qwen3Model
from r0_jax.weights import convert
from r0_jax.weights.network import Network

# 4 heads of 6 are 24, not hidden_size; two of them share a key.
FIELDS = {
    "vocab_size": 40,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
}
CONFIG = Qwen3Config.from_json(FIELDS)
LENGTHS = np.array([13, 5])
INPUT_IDS = np.random.default_rng(0).integers(0, 40, (2, 13)).astype(np.int32)
MASK = np.int32(np.arange(13)[None] < LENGTHS[:, None])
TABLE = "model.embed_tokens.embedding"
SMALL = 1e-3  # inputs of parts with a norm: at this scale a wrong epsilon shows


def torch_config(**fields):
    fields = FIELDS | fields
    theta = fields.pop("rope_theta")
    config = transformers.Qwen3Config(
        **fields, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    config._attn_implementation = "eager"
    return config


def network_of(fields) -> Network:
    config = Qwen3Config.from_json(fields)
    return Network.abstract(lambda rngs: Qwen3Model(config, rngs=rngs))


def twins(folder, **fields):
    """A torch encoder and ours, with the weights of the file that it writes."""
    module = tiny.randomize(transformers.Qwen3Model(torch_config(**fields)), seed=0)
    module.save_pretrained(folder)
    network = network_of(json.loads((folder / "config.json").read_text("utf-8")))
    return module, network, convert.load(convert.find_files(folder, "model"), network)


def test_a_layer():
    module = tiny.randomize(modeling_qwen3.Qwen3DecoderLayer(torch_config(), 0), seed=0)
    parity.quieten(module, "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")
    network = parity.part(lambda rngs: qwen3.Qwen3DecoderLayer(CONFIG, rngs=rngs))
    angles = rotary_angles(np.arange(13), 6, 1000.0)[None]
    rotary = modeling_qwen3.Qwen3RotaryEmbedding(torch_config())
    seen = torch.tensor(MASK[:, None, None] * np.tril(np.ones((13, 13), np.int32))[None, None])

    def theirs(x):
        places = rotary(x, torch.arange(13)[None])
        mask = torch.where(seen != 0, 0.0, -torch.inf)
        return module(x, position_embeddings=places, attention_mask=mask)

    parity.compare(
        lambda params, x: network(params, x, jnp.asarray(angles), jnp.asarray(MASK != 0)),
        parity.params_of(module, network.shapes),
        theirs,
        SMALL * normal(0, 2, 13, 20),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_far_away(dtype):
    rotary = modeling_qwen3.Qwen3RotaryEmbedding(torch_config(head_dim=128, rope_theta=1e6))
    cos, _ = rotary(torch.zeros(1), torch.arange(512)[None])
    found = np.cos(rotary_angles(np.arange(512), 128, 1e6, dtype))
    assert np.abs(found - cos[0, :, :64].numpy()).max() < 1e-4


@pytest.mark.parametrize("layer", [1, 2])  # the last one is normed
def test_hidden_states(layer, tmp_path):
    """Hidden states, pads included, and gradients of the table of token embeddings."""
    module, network, params = twins(tmp_path)

    def ours(params, values, ids, mask):
        params = params | {TABLE: values}
        if layer == CONFIG.num_hidden_layers:
            return network(params, ids, mask)
        return network.apply(params, "hidden_states", ids, (layer,), mask)

    def theirs(values, ids, mask):
        return torch.func.functional_call(
            module,
            {"embed_tokens.weight": values},
            kwargs={"input_ids": ids, "attention_mask": mask, "output_hidden_states": True},
        ).hidden_states[layer]

    parity.compare(ours, params, theirs, params[TABLE], INPUT_IDS, MASK)


def test_pads_on_the_right_need_no_mask(tmp_path):
    _, network, params = twins(tmp_path)

    @jax.jit
    def states(params, *mask):
        return network.apply(params, "hidden_states", jnp.asarray(INPUT_IDS), (1, 2), *mask)

    for found, expected in zip(states(params), states(params, jnp.asarray(MASK)), strict=True):
        for row, other, length in zip(found, expected, LENGTHS, strict=True):
            parity.assert_close(row[:length], other[:length], 1e-6)
    assert np.abs(found[1, 5:] - expected[1, 5:]).max() > 1e-3  # the pads themselves do


def test_files_have_the_prefix_of_a_language_model_or_not(tmp_path):
    _, network, params = twins(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "layers.0.self_attn.q_norm.weight" in tensors
    save_file({f"model.{key}": value for key, value in tensors.items()}, path)
    again = convert.load([path], network)
    assert all(np.array_equal(again[name], value) for name, value in params.items())
    parity.assert_round_trip(params, tmp_path, transformers.Qwen3Model)


def test_bfloat16(tmp_path):
    module, network, params = twins(tmp_path)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    args = params, jnp.asarray(INPUT_IDS), jnp.asarray(MASK)
    output = jax.jit(network)(*args)
    assert output.dtype == jnp.bfloat16
    expected = module(torch.tensor(INPUT_IDS), torch.tensor(MASK)).last_hidden_state
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected), 1e-1)
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}, "cos": {"float32"}}
    assert parity.input_dtypes(network, *args, primitives=list(expected)) == expected


def test_defaults_are_those_of_transformers():
    theirs = transformers.Qwen3Config()
    for name, value in dataclasses.asdict(Qwen3Config()).items():
        there = theirs.rope_parameters if name == "rope_theta" else getattr(theirs, name)
        assert value == (there[name] if name == "rope_theta" else there), name


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        {"use_sliding_window": True},
        {"hidden_act": "swish"},
        {"num_key_value_heads": 3},
        {"head_dim": 5},
        {"num_hidden_layers": 0},
        {"hidden_size": "20"},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        Qwen3Config.from_json(FIELDS | change)
    assert len(str(error.value).splitlines()) == 1
