"""BERT against transformers, forward and backward, by way of their files."""

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
from transformers.models.bert import modeling_bert as torch_bert

from r0_jax.errors import InputError
from r0_jax.models import bert
from r0_jax.models.bert import BertConfig, BertModel
from r0_jax.weights import convert
from r0_jax.weights.network import Network

FIELDS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
CONFIGS = {
    "taiyi": {},
    "others": {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-2,
        "type_vocab_size": 3,
        "max_position_embeddings": 9,
    },
    "relu": {"hidden_act": "relu", "hidden_size": 12, "num_attention_heads": 3},
}
# Without the id 0, at whose row of the table torch stops the gradient.
INPUT_IDS = np.random.default_rng(0).integers(1, 40, (2, 9)).astype(np.int32)
MASK = np.ones((2, 9), np.int32)
MASK[0, 7:], MASK[1, 4:] = 0, 0
TYPES = np.random.default_rng(1).integers(0, 2, (2, 9)).astype(np.int32)
TABLE = "embeddings.word_embeddings."


def network_of(fields, **options) -> Network:
    config = BertConfig.from_json(fields)
    return Network.abstract(lambda rngs: BertModel(config, rngs=rngs, **options))


def twins(folder, add_pooling_layer=True, **fields):
    """A torch encoder and ours, with the weights of the file that it writes."""
    module = transformers.BertModel(
        transformers.BertConfig(**FIELDS | fields), add_pooling_layer=add_pooling_layer
    )
    tiny.randomize(module, seed=0).save_pretrained(folder)
    network = network_of(
        json.loads((folder / "config.json").read_text("utf-8")), add_pooling_layer=add_pooling_layer
    )
    return module, network, convert.load(convert.find_files(folder, "model"), network)


@pytest.mark.parametrize(
    "name, add_pooling_layer, inputs",
    [
        ("taiyi", True, {}),
        ("taiyi", False, {"attention_mask": MASK}),
        ("others", True, {"attention_mask": MASK, "token_type_ids": TYPES}),
        ("relu", True, {"token_type_ids": TYPES}),
    ],
)
def test_encoder(name, add_pooling_layer, inputs, tmp_path):
    """All outputs, and gradients with respect to the table of token embeddings."""
    module, network, params = twins(tmp_path, add_pooling_layer, **CONFIGS[name])

    def run_ours(params, values, input_ids, *others):
        return network(
            params | {TABLE + "embedding": values},
            input_ids,
            **dict(zip(inputs, others, strict=True)),
        )

    def run_theirs(values, input_ids, *others):
        output = torch.func.functional_call(
            module, {TABLE + "weight": values}, (input_ids,), dict(zip(inputs, others, strict=True))
        )
        return [output.last_hidden_state] + [output.pooler_output] * add_pooling_layer

    parity.compare(
        run_ours, params, run_theirs, params[TABLE + "embedding"], INPUT_IDS, *inputs.values()
    )


@pytest.mark.parametrize("context_size", [16, 10])
def test_cross_attention(context_size):
    """To something of another width too, as in ImageReward's text encoder."""
    torch_config = transformers.BertConfig(**FIELDS)
    torch_config._attn_implementation = "sdpa"
    module = torch_bert.BertAttention(torch_config, is_cross_attention=True)
    for name in ("key", "value"):
        setattr(module.self, name, torch.nn.Linear(context_size, 16))
    tiny.randomize(module, seed=0)
    config = BertConfig.from_json(FIELDS)
    network = parity.part(
        lambda rngs: bert.BertAttention(config, context_size=context_size, rngs=rngs)
    )
    mask = np.array([[True] * 5, [True, False, True, True, False]])
    parity.compare(
        lambda params, x, context: network(params, x, jnp.asarray(mask), context),
        parity.params_of(module, network.shapes),
        lambda x, context: module(
            x,
            encoder_hidden_states=context,
            encoder_attention_mask=torch.tensor(mask)[:, None, None],
        )[0],
        normal(0, 2, 6, 16),
        normal(1, 2, 5, context_size),
    )


def test_round_trip_is_exact(tmp_path):
    parity.assert_round_trip(twins(tmp_path)[-1], tmp_path, transformers.BertModel)


def test_bfloat16(tmp_path):
    module, network, params = twins(tmp_path)
    params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    args = params, jnp.asarray(INPUT_IDS), jnp.asarray(MASK)
    output = jax.jit(network)(*args)
    expected = module(torch.tensor(INPUT_IDS), torch.tensor(MASK))
    for ours, theirs in [
        (output.last_hidden_state, expected.last_hidden_state),
        (output.pooled, expected.pooler_output),
    ]:
        assert ours.dtype == jnp.bfloat16
        parity.assert_close(ours.astype(jnp.float32), parity.to_jax(theirs), 1e-1)
    expected = {"rsqrt": {"float32"}, "exp": {"float32"}}
    assert parity.input_dtypes(network, *args, primitives=list(expected)) == expected


def test_defaults_are_those_of_transformers():
    for name, value in dataclasses.asdict(BertConfig()).items():
        assert value == getattr(transformers.BertConfig(), name), name


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "roberta"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"hidden_act": "mish"},
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"hidden_size": "16"},
        {"vocab_size": True},
        {"type_vocab_size": 0},
    ],
)
def test_what_is_not_supported_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))) as error:
        BertConfig.from_json(FIELDS | change)
    assert len(str(error.value).splitlines()) == 1
