import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from r0_jax.errors import InputError
from r0_jax.method import lora
from r0_jax.weights import convert

RANK, ALPHA = 3, 5.0
SHAPES = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {
        "block.to_q.kernel": (6, 8),
        "block.to_q.bias": (8,),
        "block.to_out.0.kernel": (8, 6),
        "block.conv.kernel": (3, 3, 6, 8),
        "block.conv.bias": (8,),
        "block.norm.scale": (8,),
        "block.pointwise.kernel": (1, 1, 8, 6),
        "block.to_q_extra.kernel": (6, 8),
    }.items()
}
TARGETS = r".*\.(to_q|to_out\.0|conv|pointwise)"


def random(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(x.shape).astype(np.float32))
        for name, x in shapes.items()
    }


@pytest.fixture
def adapters():
    return random(jax.eval_shape(lambda: lora.init(jax.random.key(0), SHAPES, TARGETS, RANK)), 1)


def test_targets_are_whole_names_of_layers_with_a_kernel():
    found = lora.targets(SHAPES, TARGETS)
    assert found == ["block.to_q", "block.to_out.0", "block.conv", "block.pointwise"]
    assert lora.targets(SHAPES, "block.*") == [*found, "block.to_q_extra"]  # no norm
    with pytest.raises(InputError, match=r"matches no layer .*'to_q'; a layer is called, for"):
        lora.targets(SHAPES, "to_q")
    with pytest.raises(InputError, match=r"not a regular expression .*'\(to_q'"):
        lora.targets(SHAPES, "(to_q")


def test_starts_exactly_as_the_base():
    base = random(SHAPES, 0)
    adapters = lora.init(jax.random.key(0), SHAPES, TARGETS, RANK)
    merged = lora.merge(base, adapters, ALPHA / RANK)
    assert list(merged) == list(base)
    for name, value in base.items():
        np.testing.assert_array_equal(merged[name], value)
    assert float(lora.squared_norm(adapters, ALPHA / RANK)) == 0


def test_factors_are_random_by_layer():
    shapes = {f"{name}.kernel": jax.ShapeDtypeStruct((64, 8), jnp.float32) for name in "ab"}
    adapters = lora.init(jax.random.key(0), shapes, ".*", 32)
    a, b = adapters["a.lora_A.kernel"], adapters["b.lora_A.kernel"]
    assert a.dtype == jnp.float32 and a.shape == (64, 32)
    np.testing.assert_allclose(a.std() * 32, 1, atol=0.05)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(6, 8)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(8, 6, bias=False)])
        self.conv = torch.nn.Conv2d(6, 8, 3)
        self.norm = torch.nn.GroupNorm(2, 8, affine=True)
        self.norm.bias = None
        self.pointwise = torch.nn.Conv2d(8, 6, 1, bias=False)
        self.to_q_extra = torch.nn.Linear(6, 8, bias=False)


def to_torch(params):
    return {
        convert.to_key(name): torch.tensor(convert.to_checkpoint(name, np.asarray(x)))
        for name, x in params.items()
    }


def test_merge_equals_peft(adapters):
    base = random(SHAPES, 0)
    root = torch.nn.Module()
    root.block = Block()
    root.load_state_dict(to_torch(base))
    model = peft.get_peft_model(
        root, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    )
    files = {f"base_model.model.{key}": value for key, value in to_torch(adapters).items()}
    assert set(files) == set(peft.get_peft_model_state_dict(model))  # the names of PEFT's files
    peft.set_peft_model_state_dict(model, files)
    expected = model.merge_and_unload().state_dict()

    merged = to_torch(lora.merge(base, adapters, ALPHA / RANK))
    assert set(merged) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(merged[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_merge_keeps_the_dtype_of_the_base_and_adds_in_float32(adapters):
    base = {name: value.astype(jnp.bfloat16) for name, value in random(SHAPES, 0).items()}
    merged = lora.merge(base, adapters, 1.5)
    assert {x.dtype for x in merged.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = lora.merge({k: v.astype(jnp.float32) for k, v in base.items()}, adapters, 1.5)
    for name, value in exact.items():
        np.testing.assert_array_equal(merged[name], value.astype(jnp.bfloat16))


def test_squared_norm_is_that_of_the_product(adapters):
    zeros = jax.tree.map(jnp.zeros_like, random(SHAPES, 0))

    def formed(adapters):
        return sum(jnp.sum(x**2) for x in lora.merge(zeros, adapters, 1.7).values())

    value, grads = jax.value_and_grad(lora.squared_norm)(adapters, 1.7)
    expected, expected_grads = jax.value_and_grad(formed)(adapters)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-4, err_msg=name)


def test_is_adapter(adapters):
    assert lora.is_adapter(adapters)
    assert not lora.is_adapter(SHAPES)


def test_the_largest_rank_is_that_of_the_smallest_matrix():
    """Of a convolution the window counts among the inputs."""
    shapes = {
        f"{name}.kernel": jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in {"wide": (40, 30), "narrow": (50, 8), "conv": (3, 3, 2, 20)}.items()
    }
    lora.check_rank(shapes, "wide|conv", 18)
    with pytest.raises(InputError, match=r"lora.rank=19 is above what fits conv, .*use 18 at most"):
        lora.check_rank(shapes, "wide|conv", 19)
    with pytest.raises(InputError, match="what fits narrow, a matrix of rank 8: use 8 at most"):
        lora.check_rank(shapes, ".*", 31)
