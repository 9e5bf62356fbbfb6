"""Qwen2-VL: the names of the published file, and transformers' numbers and image gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import qwen2_vl as twin
import torch
from parity import normal
from published import config_of

from r0_jax.errors import InputError
from r0_jax.models import repeat
from r0_jax.models.qwen2_vl import (
    HPSv3,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    image_positions,
)
from r0_jax.models.qwen2_vl_vision import Qwen2VisionTransformer
from r0_jax.weights import convert
from r0_jax.weights.network import Network

DATA = pathlib.Path(__file__).parents[1] / "data"
BEFORE = [1, 2, 3, 192]
AFTER = [[193, 9, 8, 7, 6], [193, 5, 4]]
FILLED = np.array([AFTER[0], [*AFTER[1], -1, -1]], np.int32)


def network_of(kind, fields, **options):
    config = Qwen2VLConfig.from_json(fields)
    return Network.abstract(lambda rngs: kind(config, rngs=rngs, **options))


def test_names_and_shapes_of_the_published_file():
    fields = config_of("hps_v3")
    ours = {
        convert.to_key(name): list(convert.file_shape(name, struct.shape))
        for name, struct in network_of(HPSv3, fields).shapes.items()
    }
    theirs = json.loads((DATA / "keys" / "hps_v3.json").read_text("utf-8"))["keys"]
    lost = {key: theirs.pop(key) for key in ["lm_head.weight"]}
    assert ours == theirs
    short = fields | {"num_hidden_layers": 1}
    short["vision_config"] = fields["vision_config"] | {"depth": 1}
    words = network_of(Qwen2VLForConditionalGeneration, short).shapes["lm_head.kernel"].shape
    assert list(words[::-1]) == lost["lm_head.weight"]


@pytest.fixture(scope="module")
def hps():
    module, network = twin.hps_v3(), network_of(HPSv3, twin.FIELDS)
    return module, network, parity.params_of(module, network.shapes)


@pytest.mark.parametrize("shape", [(84, 56), (28, 112)], ids="{0[0]}x{0[1]}".format)
def test_the_image(hps, shape):
    module, whole, params = hps
    network = parity.part(
        lambda rngs: Qwen2VisionTransformer(whole.config.vision_config, rngs=rngs)
    )
    parity.compare(
        network,
        {name: params[f"visual.{name}"] for name in network.shapes},
        module.image_tokens,
        normal(0, 2, *shape, 3),
    )


def test_hps_v3_is_plain_rope_up_to_the_last_token(hps):
    module, network, params = hps
    parity.compare(
        lambda params, images: network(params, images, np.asarray(BEFORE), jnp.asarray(FILLED)),
        params,
        lambda images: module(images, BEFORE, AFTER),
        normal(0, 2, 84, 56, 3),
    )


def test_blocks_and_layers_are_loops_that_compute_again(hps):
    _, network, params = hps
    images = jnp.asarray(normal(0, 2, 28, 56, 3))

    def trace(choice):
        def score(images):
            with repeat.use(choice):
                return network(params, images, np.asarray(BEFORE), jnp.asarray(FILLED)).sum()

        return jax.jit(jax.value_and_grad(score)).trace(images)

    plain, loops = trace(repeat.PLAIN), trace(repeat.Repeat(scan=True, remat=True))
    assert str(loops.jaxpr).count("length=2") >= 4  # of image and text, there and back
    expected, found = (traced.lower().compile()(images) for traced in (plain, loops))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_next_word_is_that_of_transformers_with_mrope():
    module = twin.model()
    state = twin.state_of(module)
    network = network_of(Qwen2VLForConditionalGeneration, twin.FIELDS)
    params = {
        name: convert.from_checkpoint(name, state[convert.to_key(name)].numpy())
        for name in network.shapes
    }
    assert len(params) == len(state)

    def theirs(images):
        return torch.stack([twin.next_word(module, images, BEFORE, text) for text in AFTER], dim=1)

    parity.compare(
        lambda params, images: network(
            params, images, np.asarray(BEFORE), jnp.asarray(np.stack([FILLED] * 2))
        ),
        params,
        theirs,
        normal(0, 2, 84, 140, 3),
    )


def test_positions_of_an_image_and_of_the_text_after_it():
    found = image_positions(2, 2, 3, 2)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_it_computes_in_bfloat16_and_scores_in_float32(hps):
    _, network, _ = hps
    shapes = {
        k: jax.ShapeDtypeStruct(v.shape, jnp.float32 if k.startswith("rm_head") else jnp.bfloat16)
        for k, v in network.shapes.items()
    }
    images = jax.ShapeDtypeStruct((2, 28, 56, 3), jnp.bfloat16)
    before, after = np.asarray(BEFORE), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    run = lambda params, images, after: network(params, images, before, after)  # noqa: E731
    assert jax.eval_shape(run, shapes, images, after).dtype == jnp.float32
    found = parity.input_dtypes(
        run, shapes, images, after, primitives=["exp", "rsqrt", "dot_general", "cos"]
    )
    dots = found.pop("dot_general")
    assert found == {name: {"float32"} for name in found}
    assert dots == {"bfloat16", "float32"}


def test_the_config_of_transformers_5_says_the_same():
    nested = json.loads(twin.model().config.to_json_string())
    assert "text_config" in nested and "hidden_size" not in nested
    assert Qwen2VLConfig.from_json(nested) == Qwen2VLConfig.from_json(twin.FIELDS)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_attention_heads": 3}, "3 heads do not divide the width 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide"),
        ({"rope_scaling": {"mrope_section": [1, 1, 1]}}, r"mrope_section = \[1, 1, 1\] is not"),
        ({"rope_scaling": "x"}, "must be objects"),
        ({"vision_config": 3}, "must be objects"),
        ({"vision_config": {"patch_size": 16}}, "patch_size = 16 is not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
        ({"vision_config": {"hidden_size": 9}}, "the image's tokens have width 9"),
        ({"vision_config": {"hidden_size": 32, "depth": 0}}, "depth = 0 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, said):
    with pytest.raises(InputError, match=said) as error:
        Qwen2VLConfig.from_json(twin.FIELDS | fields)
    assert len(str(error.value).splitlines()) == 1
