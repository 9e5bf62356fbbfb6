import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r0_jax.models import linear
from r0_jax.models.linear import Adapted, Conv, Linear
from r0_jax.weights.network import Network

LAYERS = {
    "linear": (lambda rngs: Linear(6, 5, rngs=rngs), (2, 7, 6)),
    "linear without bias": (lambda rngs: Linear(6, 5, use_bias=False, rngs=rngs), (2, 6)),
    "pointwise": (lambda rngs: Conv(6, 5, kernel_size=(1, 1), rngs=rngs), (2, 4, 4, 6)),
    "strided": (
        lambda rngs: Conv(6, 5, kernel_size=(3, 3), strides=2, padding=((1, 1), (1, 1)), rngs=rngs),
        (2, 5, 4, 6),
    ),
    "patches": (
        lambda rngs: Conv(6, 5, kernel_size=(2, 2), strides=2, padding="VALID", rngs=rngs),
        (2, 4, 4, 6),
    ),
}


class Holder(nnx.Module):
    def __init__(self, layer):
        self.layer, self.config = layer, None

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapted_kernel_acts_as_the_sum(name):
    make, shape = LAYERS[name]
    network = Network.abstract(lambda rngs: Holder(make(rngs)))
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {key: random(*x.shape) for key, x in network.shapes.items()}
    *window, inputs, outputs = params["layer.kernel"].shape
    a, b = random(*window, inputs, 3), random(*(1 for _ in window), 3, outputs)
    x = random(*shape)

    def beside(a, b, x):
        adapted = params | {"layer.kernel": Adapted(params["layer.kernel"], a, b)}
        return jnp.sum(jnp.sin(network(adapted, x)))

    def merged(a, b, x):
        return jnp.sum(
            jnp.sin(network(params | {"layer.kernel": params["layer.kernel"] + a @ b}, x))
        )

    found = jax.value_and_grad(beside, (0, 1, 2))(a, b, x)
    expected = jax.value_and_grad(merged, (0, 1, 2))(a, b, x)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-4), found, expected
    )


@pytest.mark.parametrize("name", ["linear", "strided"])
def test_bfloat16_keeps_a_change_that_its_sum_would_lose(name):
    make, shape = LAYERS[name]
    network = Network.abstract(lambda rngs: Holder(make(rngs)))
    params = {key: jnp.ones(x.shape, jnp.bfloat16) for key, x in network.shapes.items()}
    kernel = params["layer.kernel"]
    *window, inputs, outputs = kernel.shape
    a = jnp.full((*window, inputs, 1), 2.0**-5, jnp.bfloat16)
    b = jnp.full((*(1 for _ in window), 1, outputs), 2.0**-5, jnp.bfloat16)
    np.testing.assert_array_equal(kernel + a @ b, kernel)  # 1 + 1/1024 is rounded to 1
    x = jnp.zeros(shape, jnp.bfloat16).at[..., 0].set(1)

    def outcome(b):
        return jnp.sum(
            network(params | {"layer.kernel": Adapted(kernel, a, b)}, x), dtype=jnp.float32
        )

    moved = jax.grad(outcome)(b)
    assert moved.dtype == jnp.bfloat16 and float(jnp.abs(moved).min()) > 0
    only = network(
        {"layer.kernel": Adapted(jnp.zeros_like(kernel), a, b)}
        | {key: jnp.zeros_like(value) for key, value in params.items() if key != "layer.kernel"},
        x,
    )
    assert float(only.max()) >= 2.0**-10


def test_every_network_is_made_of_these_layers():
    """Else an adapter on a layer of it would be a traceback."""
    models = Path(linear.__file__).parent
    plain = re.compile(r"nnx\.(Linear|Conv)\b")
    found = {path.name for path in models.glob("*.py") if plain.search(path.read_text("utf-8"))}
    assert found == {"linear.py"}
