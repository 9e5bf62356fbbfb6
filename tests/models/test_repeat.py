"""Blocks as a loop, and computed again in the backward pass: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r0_jax.models import repeat
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.models.clip import CLIPTextConfig, CLIPTextModelWithProjection
from r0_jax.models.repeat import Repeat
from r0_jax.models.t5 import T5Config, T5EncoderModel
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig, SD3Transformer2DModel
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.parallel import sharding
from r0_jax.stand_ins import miniature, miniature_files
from r0_jax.weights.network import Network


class Block(nnx.Module):
    def __init__(self, inner: int, *, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(8, inner, rngs=rngs), nnx.Linear(inner, 8, rngs=rngs)

    def __call__(self, x, shift):
        return x + self.down(jnp.tanh(self.up(x) + shift))


def blocks() -> list[Block]:
    rngs = nnx.Rngs(0)
    return [Block(inner, rngs=rngs) for inner in (16, 16, 16, 4)]  # three alike and one that is not


def run(choice: Repeat):
    graphdef, state = nnx.split(nnx.List(blocks()))

    def loss(state, x, shift):
        with repeat.use(choice):
            made = nnx.merge(graphdef, state)
            return jnp.sum(repeat.repeat(made, lambda block, x: block(x, shift), x) ** 2)

    x = jax.random.normal(jax.random.key(1), (8, 8))
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(state, x, jnp.float32(0.3))
    return traced, traced.lower().compile()(state, x, jnp.float32(0.3))


@pytest.mark.parametrize("choice", [Repeat(scan=True), Repeat(remat=True), Repeat(True, True)])
def test_same_values_and_gradients(choice):
    _, expected = run(repeat.PLAIN)
    _, found = run(choice)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_identical_neighbours_are_one_loop():
    text = str(run(Repeat(scan=True))[0].jaxpr)
    assert "length=3" in text
    assert "scan[" not in str(run(repeat.PLAIN)[0].jaxpr)


def test_remat_keeps_inputs_only():
    """What the forward pass hands to the backward pass, beside the parameters."""

    def residuals(choice: Repeat) -> int:
        graphdef, state = nnx.split(nnx.List(blocks()))

        def f(x):
            with repeat.use(choice):
                made = nnx.merge(graphdef, state)
                return repeat.repeat(made, lambda block, x: block(x, 0.3), x)

        _, pullback = jax.vjp(f, jnp.ones((1000, 8)))
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.ndim > 1)

    assert residuals(Repeat(remat=True)) < 0.7 * residuals(repeat.PLAIN)


def test_split_parameters_are_gathered_by_each_block():
    mesh = sharding.make_mesh({"fsdp": 8})
    split = sharding.batch_sharding(mesh)
    graphdef, state = nnx.split(nnx.List(blocks()[:3]))

    def f(state, x, gathered):
        with repeat.use(Repeat(scan=True, gathered=gathered)):
            made = nnx.merge(graphdef, state)
            return repeat.repeat(made, lambda block, x: block(x, 0.3), x)

    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, split), state)
    x = jax.device_put(jnp.ones((8, 8)), split)
    traced = {
        gathered: jax.jit(f, static_argnums=2, out_shardings=split).trace(placed, x, gathered)
        for gathered in (None, sharding.replicated(mesh))
    }
    asked = [str(one.jaxpr).count("sharding_constraint[") for one in traced.values()]
    assert asked == [0, 4]  # of a block's kernels and biases, where the loop's body begins
    plain, gathered = (one.lower().compile() for one in traced.values())
    assert "all-gather" in gathered.as_text() and "all-reduce" not in gathered.as_text()
    np.testing.assert_allclose(gathered(placed, x), plain(placed, x), rtol=1e-6)


NETWORKS = {
    "unet": (
        lambda rngs: UNet2DConditionModel(
            UNet2DConditionConfig.from_json(
                miniature.XL_UNET | {"transformer_layers_per_block": [1, 3]}
            ),
            rngs=rngs,
        ),
        lambda key: (
            normal(key, 2, 8, 8, 4),
            jnp.full(2, 500.0),
            normal(key, 2, 5, 40),
            normal(key, 2, 12),
            jnp.ones((2, 6), jnp.int32),
        ),
        "__call__",
    ),
    "mmdit": (
        lambda rngs: SD3Transformer2DModel(
            SD3Transformer2DConfig.from_json(miniature.TRANSFORMER | {"num_layers": 4}), rngs=rngs
        ),
        lambda key: (
            normal(key, 2, 8, 8, 16),
            jnp.full(2, 500.0),
            normal(key, 2, 5, 40),
            normal(key, 2, 20),
        ),
        "__call__",
    ),
    "t5": (
        lambda rngs: T5EncoderModel(
            T5Config.from_json(miniature.T5 | {"num_layers": 4, "vocab_size": 50}), rngs=rngs
        ),
        lambda key: (jax.random.randint(key, (2, 6), 0, 50),),
        "__call__",
    ),
    "clip": (
        lambda rngs: CLIPTextModelWithProjection(
            CLIPTextConfig.from_json(
                miniature.BIG_CLIP_TEXT | {"num_hidden_layers": 4, "vocab_size": 50}
            ),
            rngs=rngs,
        ),
        lambda key: (jax.random.randint(key, (2, 6), 0, 50),),
        "__call__",
    ),
    "vae": (
        lambda rngs: AutoencoderKL(
            AutoencoderKLConfig.from_json(miniature.VAE | {"layers_per_block": 2}), rngs=rngs
        ),
        lambda key: (normal(key, 2, 8, 8, 4),),
        "decode",
    ),
}


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_the_same_as_loops(name):
    constructor, inputs, method = NETWORKS[name]
    network = Network.abstract(constructor)
    params = miniature_files.random_params(network, 0)

    def loss(params, choice, *inputs):
        with repeat.use(choice):
            outputs = network.apply(params, method, *inputs)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))

    def run(choice):
        step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        traced = step.trace(params, choice, *inputs(jax.random.key(3)))
        return str(traced.jaxpr), traced.lower().compile()(params, *inputs(jax.random.key(3)))

    text, (value, grads) = run(Repeat(scan=True, remat=True))
    plain, (expected, expected_grads) = run(repeat.PLAIN)
    assert text.count("scan[") > plain.count("scan[")
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for key, gradient in expected_grads.items():
        np.testing.assert_allclose(
            grads[key], gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max() + 1e-5, err_msg=key
        )
