import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r0_jax.method import lora, stacks
from r0_jax.models.linear import Adapted
from r0_jax.weights.network import Params

NAMES = [
    f"down.0.transformer_blocks.{i}.attn.to_q.lora_{half}.kernel" for i in range(3) for half in "AB"
]


@pytest.fixture
def params() -> Params:
    shapes = {name: (8, 2) if "_A" in name else (2, 4) for name in NAMES}
    shapes |= {"conv_in.lora_A.kernel": (3, 3, 8, 2), "conv_in.lora_B.kernel": (1, 1, 2, 4)}
    return {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_blocks_are_stacked_in_their_order_and_the_rest_stays(params):
    packed = stacks.pack(params, stacks.groups(params))
    assert {name: x.shape for name, x in packed.items()} == {
        "down.0.transformer_blocks.*.attn.to_q.lora_A.kernel": (3, 8, 2),
        "down.0.transformer_blocks.*.attn.to_q.lora_B.kernel": (3, 2, 4),
        "conv_in.lora_A.kernel": (3, 3, 8, 2),
        "conv_in.lora_B.kernel": (1, 1, 2, 4),
    }
    np.testing.assert_array_equal(
        packed["down.0.transformer_blocks.*.attn.to_q.lora_A.kernel"][2], params[NAMES[4]]
    )


def test_any_tree_comes_back(params):
    tree = (jnp.zeros(()), optax.adam(1e-3).init(params), {"moments": params})
    packed = stacks.pack(tree, stacks.groups(params))
    assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(tree))
    back = stacks.unpack(packed)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize(
    "change",
    [
        {NAMES[2]: (8, 3)},  # another shape in one block
        {name: (1024, 1025) for name in NAMES},  # too large
    ],
)
def test_what_cannot_or_should_not_be_stacked_stays_alone(params, change):
    shapes = {
        name: jax.ShapeDtypeStruct(change.get(name, x.shape), x.dtype) for name, x in params.items()
    }
    alone = set(change)
    assert alone <= set(stacks.groups(shapes))


def test_blocks_that_do_not_count_from_zero_stay_alone(params):
    del params[NAMES[0]]
    assert set(stacks.groups(params)) >= {NAMES[2], NAMES[4]}


def test_adapters_act_alike_packed_and_not(params):
    base = {f"down.0.transformer_blocks.{i}.attn.to_q.kernel": jnp.ones((8, 4)) for i in range(3)}
    base["conv_in.kernel"] = jnp.ones((3, 3, 8, 4))
    packed = stacks.pack(params, stacks.groups(params))

    def outcome(params):
        adapted = lora.adapt(base, params, 1.5)
        changes = [x for x in adapted.values() if isinstance(x, Adapted)]
        assert len(changes) == 4
        return lora.squared_norm(params, 1.5) + sum(jnp.sum((x.a @ x.b) ** 3) for x in changes)

    value, grads = jax.value_and_grad(outcome)(packed)
    expected, expected_grads = jax.value_and_grad(outcome)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        stacks.unpack(grads),
        expected_grads,
    )
