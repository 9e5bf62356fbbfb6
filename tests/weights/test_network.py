"""Modules as pure functions over flat dicts of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from r0_jax.models.clip import CLIPTextConfig, CLIPTextModel
from r0_jax.models.transformer_2d import BasicTransformerBlock
from r0_jax.weights import network
from r0_jax.weights.network import Network


class Pair(nnx.Module):
    """Has all that names are made of: lists with a gap, an embedding, a bare parameter."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.layers = nnx.List(
            [nnx.Linear(3, 4, rngs=rngs), nnx.Module(), nnx.LayerNorm(4, rngs=rngs)]
        )
        self.table = nnx.Embed(5, 3, rngs=rngs)
        self.offset = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, ids, *, scale):
        x = self.table(ids) + self.offset.get_value()[None]
        return scale * self.layers[2](self.layers[0](x))

    def total(self):
        return jnp.sum(self.offset.get_value())


def build(rngs):
    return Pair("the config", rngs=rngs)


NAMES = {
    "layers.0.kernel": (3, 4),
    "layers.0.bias": (4,),
    "layers.2.scale": (4,),
    "layers.2.bias": (4,),
    "table.embedding": (5, 3),
    "offset": (3,),
}


def test_abstract_names_and_shapes():
    pair = Network.abstract(build)
    assert {name: struct.shape for name, struct in pair.shapes.items()} == NAMES
    assert all(
        isinstance(struct, jax.ShapeDtypeStruct) and struct.dtype == jnp.float32
        for struct in pair.shapes.values()
    )
    assert pair.config == "the config"


def test_abstract_allocates_nothing():
    held = sum(x.nbytes for x in jax.live_arrays())
    Network.abstract(lambda rngs: Pair(nnx.Linear(20_000, 20_000, rngs=rngs), rngs=rngs))
    assert sum(x.nbytes for x in jax.live_arrays()) - held < 1e6


def test_init_is_that_of_nnx_and_differs_by_key():
    params = network.init(build, jax.random.key(3))
    module = jax.jit(lambda key: nnx.state(build(nnx.Rngs(key))))(jax.random.key(3))
    for path, leaf in nnx.to_flat_state(module):
        np.testing.assert_allclose(params[".".join(map(str, path))], leaf.get_value(), rtol=1e-6)
    assert {name: value.shape for name, value in params.items()} == NAMES
    other = network.init(build, jax.random.key(4))
    assert not np.array_equal(params["offset"], other["offset"])
    assert not np.array_equal(params["layers.0.kernel"], params["table.embedding"][:, :4])


def test_call_and_method_equal_the_module():
    pair, ids = Network.abstract(build), jnp.asarray([1, 4])
    params = network.init(build, jax.random.key(0))
    module = build(nnx.Rngs(0))
    nnx.update(
        module,
        nnx.from_flat_state(
            [
                (path, nnx.Param(params[".".join(map(str, path))]))
                for path, _ in nnx.to_flat_state(nnx.state(module))
            ]
        ),
    )
    np.testing.assert_array_equal(pair(params, ids, scale=2.0), module(ids, scale=2.0))
    np.testing.assert_array_equal(pair.apply(params, "total"), module.total())


def test_it_is_pure_and_differentiable_in_the_flat_parameters():
    pair = Network.abstract(build)
    params = network.init(build, jax.random.key(0))
    before = {name: np.array(value) for name, value in params.items()}

    @jax.jit
    def gradients(params, ids):
        return jax.grad(lambda params: jnp.sum(pair(params, ids, scale=1.0) ** 2))(params)

    grads = gradients(params, jnp.asarray([1, 4]))
    assert {name: value.shape for name, value in grads.items()} == NAMES
    assert all(np.any(value) for value in grads.values())
    assert not np.any(grads["table.embedding"][0])  # a row that was not asked for
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value)


def test_parameters_on_the_host_and_of_another_dtype():
    pair = Network.abstract(build)
    params = network.init(build, jax.random.key(0))
    on_host = {name: np.asarray(value) for name, value in params.items()}
    ids = jnp.asarray([1, 4])
    np.testing.assert_array_equal(pair(on_host, ids, scale=1.0), pair(params, ids, scale=1.0))


def test_parameters_of_another_network_are_an_error():
    pair = Network.abstract(build)
    params = network.init(build, jax.random.key(0))
    renamed = params | {"offset2": params["offset"]}
    with pytest.raises(ValueError, match="offset2"):
        pair(renamed, jnp.asarray([1]), scale=1.0)
    del renamed["offset"]  # as many as there should be
    with pytest.raises(ValueError, match="offset, offset2"):
        pair(renamed, jnp.asarray([1]), scale=1.0)
    del params["offset"]
    with pytest.raises(ValueError, match="offset"):
        pair(params, jnp.asarray([1]), scale=1.0)


def test_names_of_models_are_those_of_their_files():
    config = CLIPTextConfig.from_json(tiny.TEXT)
    names = Network.abstract(lambda rngs: CLIPTextModel(config, rngs=rngs)).shapes
    assert names["text_model.embeddings.token_embedding.embedding"].shape == (49408, 16)
    assert names["text_model.encoder.layers.1.mlp.fc1.kernel"].shape == (16, 32)
    block = nnx.eval_shape(lambda: BasicTransformerBlock(8, 2, 12, rngs=nnx.Rngs(0)))
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(block))}
    # Dropout holds an index of the list and no parameter.
    assert {"ff.net.0.proj.kernel", "ff.net.2.kernel", "attn1.to_out.0.bias"} <= paths
    assert not any(".net.1" in path or "to_out.1" in path for path in paths)
