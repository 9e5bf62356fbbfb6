import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r0_jax.method import lora, stacks
from r0_jax.method.generator import Generator
from r0_jax.models.linear import Adapted

KEY = jax.random.key(0)
BASE = {
    "mid.attn1.to_q.kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "mid.norm.scale": np.full(4, 1.5, np.float32),
}
SHAPES = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in BASE.items()}


def half(params):
    return {name: value.astype(jnp.bfloat16) for name, value in params.items()}


def whole(weight):
    return weight.kernel + weight.a @ weight.b if isinstance(weight, Adapted) else weight


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_starts_as_the_base_in_its_dtype(rank, dtype):
    base = BASE if dtype == "float32" else half(BASE)
    generator = Generator(rank, 8.0, ".*to_q", dtype)
    params = generator.init(KEY, base, SHAPES)
    assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.float32)}
    weights = generator.weights(params, base)
    assert {str(x.dtype) for x in jax.tree.leaves(weights)} == {dtype}
    for name, value in base.items():
        np.testing.assert_array_equal(whole(weights[name]), value)
    assert float(generator.squared_distance(params, base)) == 0


def test_full_weights_are_copies():
    base = jax.tree.map(jnp.asarray, BASE)
    params = Generator(0, 1.0, "").init(KEY, base, SHAPES)
    assert list(params) == list(base)
    for name, value in base.items():
        assert params[name].unsafe_buffer_pointer() != value.unsafe_buffer_pointer()


def test_adapters_are_scaled_by_alpha_over_rank():
    generator = Generator(2, 8.0, ".*to_q")
    params = {name: jnp.ones_like(x) for name, x in generator.init(KEY, BASE, SHAPES).items()}
    weights = generator.weights(params, BASE)
    np.testing.assert_allclose(
        whole(weights["mid.attn1.to_q.kernel"]), BASE["mid.attn1.to_q.kernel"] + 4 * 2
    )  # scale 4, rank 2
    np.testing.assert_array_equal(weights["mid.norm.scale"], BASE["mid.norm.scale"])
    np.testing.assert_allclose(generator.squared_distance(params, BASE), 12 * 8.0**2)
    assert generator.scale == 4 and set(params) == set(lora.init(KEY, SHAPES, ".*to_q", 2))


def test_squared_distance_of_full_weights_and_its_gradient():
    generator = Generator(0, 1.0, "")
    params = {name: x + 0.5 for name, x in generator.init(KEY, BASE, SHAPES).items()}
    value, grads = jax.value_and_grad(generator.squared_distance)(params, BASE)
    np.testing.assert_allclose(value, 16 * 0.25, rtol=1e-6)
    for grad in grads.values():
        np.testing.assert_allclose(grad, 1.0, rtol=1e-6)


def test_a_share_of_the_way_back_to_the_base_stacked_or_not():
    blocks = {f"transformer_blocks.{i}.norm.scale": np.full(4, i + 1.0) for i in range(3)}
    base = {k: jnp.asarray(v, jnp.float32) for k, v in (BASE | blocks).items()}
    params = {name: x + 2.0 for name, x in base.items()}
    packed = stacks.pack(params, stacks.groups(params))
    assert any("*" in name for name in packed)
    for given in (params, packed):
        found = stacks.unpack(Generator(0, 1.0, "").toward_base(given, base, jnp.float32(0.25)))
        for name, value in base.items():
            np.testing.assert_allclose(found[name], value + 1.5, rtol=1e-6, err_msg=name)


def test_a_share_of_the_adapters_product_is_taken_away():
    generator = Generator(2, 8.0, ".*to_q")
    params = {name: jnp.ones_like(x) for name, x in generator.init(KEY, BASE, SHAPES).items()}
    found = generator.toward_base(params, BASE, jnp.float32(0.25))
    name = "mid.attn1.to_q.kernel"
    before, after = (whole(generator.weights(p, BASE)[name]) - BASE[name] for p in (params, found))
    np.testing.assert_allclose(after, 0.75 * before, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_base_has_the_form_of_the_trained_weights(rank):
    generator = Generator(rank, 8.0, ".*to_q")
    params = {name: x + 1.0 for name, x in generator.init(KEY, BASE, SHAPES).items()}
    found = generator.base_weights(params, BASE)
    assert jax.tree.structure(found) == jax.tree.structure(generator.weights(params, BASE))
    for name, value in BASE.items():
        np.testing.assert_allclose(whole(found[name]), value, rtol=1e-6)
