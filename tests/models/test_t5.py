"""T5's encoder against transformers, forward and backward, by way of their files."""

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
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention as TorchAttention

from r0_jax.errors import InputError
from r0_jax.models.t5 import T5Config, T5EncoderModel, relative_position_buckets
from r0_jax.weights import convert
from r0_jax.weights.network import Network

# 3 heads of 6 are 18, not d_model; the prompts are longer than max_distance.
FIELDS = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "feed_forward_proj": "gated-gelu",
}
CONFIGS = {
    "v1.1": {},
    "original": {"feed_forward_proj": "relu"},
    "others": {
        "feed_forward_proj": "gated-relu",
        "layer_norm_epsilon": 1e-2,
        "num_layers": 3,
        "relative_attention_num_buckets": 11,
        "num_heads": 2,
        "d_kv": 8,
    },
    "gelu": {"feed_forward_proj": "gelu", "num_layers": 1, "relative_attention_max_distance": 99},
}
INPUT_IDS = np.random.default_rng(0).integers(2, 40, (2, 13)).astype(np.int32)
INPUT_IDS[0, 8:], INPUT_IDS[1, 3:] = 0, 0
MASK = np.int32(INPUT_IDS != 0)
TABLE = "shared.embedding"


def network_of(fields) -> Network:
    config = T5Config.from_json(fields)
    return Network.abstract(lambda rngs: T5EncoderModel(config, rngs=rngs))


def twins(folder, **fields):
    """A torch encoder and ours, with the weights of the file that it writes."""
    config = transformers.T5Config(**FIELDS | fields)
    module = tiny.randomize(transformers.T5EncoderModel(config), seed=0)
    module.save_pretrained(folder)
    network = network_of(json.loads((folder / "config.json").read_text("utf-8")))
    return module, network, convert.load(convert.find_files(folder, "model"), network)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder(name, masked, tmp_path):
    """Hidden states, and gradients with respect to the table of token embeddings."""
    module, network, params = twins(tmp_path, **CONFIGS[name])
    mask = [MASK] * masked

    def run_ours(params, values, *inputs):
        return network(params | {TABLE: values}, *inputs)

    def run_theirs(values, *inputs):
        return torch.func.functional_call(
            module, {"shared.weight": values}, inputs
        ).last_hidden_state

    parity.compare(run_ours, params, run_theirs, params[TABLE], INPUT_IDS, *mask)


@pytest.mark.parametrize(
    "buckets, max_distance",
    [(32, 128), (32, 256), (64, 128), (8, 10), (33, 100), (6, 17), (4, 2), (16, 1000)],
)
def test_buckets(buckets, max_distance):
    positions = torch.arange(400)
    expected = TorchAttention._relative_position_bucket(
        positions[None, :] - positions[:, None], True, buckets, max_distance
    )
    ours = relative_position_buckets(400, buckets, max_distance)
    np.testing.assert_array_equal(ours, expected.numpy())
    assert ours.max() == buckets // 2 * 2 - 1


def test_round_trip_is_exact(tmp_path):
    parity.assert_round_trip(twins(tmp_path)[-1], tmp_path, transformers.T5EncoderModel)


@pytest.mark.parametrize(
    "keys", [["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]]
)
def test_files_may_name_the_shared_table_after_the_encoder(keys, tmp_path):
    _, network, params = twins(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors |= dict.fromkeys(keys, tensors.pop("shared.weight"))
    save_file(tensors, path)
    again = convert.load([path], network)
    assert all(np.array_equal(again[name], value) for name, value in params.items())

    save_file(tensors | {"decoder.embed_tokens.weight": tensors[keys[0]]}, path)
    with pytest.raises(InputError, match=r"unexpected key.*decoder.embed_tokens.weight"):
        convert.load([path], network)


def test_bfloat16(tmp_path):
    module, network, params = twins(tmp_path)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    args = params, jnp.asarray(INPUT_IDS), jnp.asarray(MASK)
    output = jax.jit(network)(*args)
    assert output.dtype == jnp.bfloat16
    expected = module(torch.tensor(INPUT_IDS), torch.tensor(MASK)).last_hidden_state
    parity.assert_close(output.astype(jnp.float32), parity.to_jax(expected), 1e-1)
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}}
    assert parity.input_dtypes(network, *args, primitives=list(expected)) == expected


def test_defaults_are_those_of_transformers():
    for name, value in dataclasses.asdict(T5Config()).items():
        assert value == getattr(transformers.T5Config(), name), name


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "umt5"},
        {"is_decoder": True},
        {"feed_forward_proj": "gated-mish"},
        {"feed_forward_proj": "gated-gated-gelu"},
        {"feed_forward_proj": None},
        {"d_kv": 0},
        {"d_model": "16"},
        {"num_heads": True},
        {"num_layers": 0},
        {"relative_attention_num_buckets": 3},
        {"relative_attention_max_distance": 2},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        T5Config.from_json(FIELDS | change)
    assert len(str(error.value).splitlines()) == 1
