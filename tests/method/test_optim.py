import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from r0_jax.errors import InputError
from r0_jax.method import optim, train_state
from r0_jax.parallel import sharding


def config(**changes):
    fields = dict(
        learning_rate=1e-2,
        warmup_steps=0,
        schedule="constant",
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1e9,
    )
    return ConfigDict({"steps": 100, "seed": 0, "optimizer": fields | changes})


def one_update(optimizer, params, grads):
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)


PARAMS = {"layer.kernel": jnp.ones((3, 2)), "layer.bias": jnp.ones(2)}
GRADS = {"layer.kernel": jnp.full((3, 2), 0.5), "layer.bias": jnp.full(2, -2.0)}


def test_first_adam_update_is_the_sign_of_the_gradient_times_the_rate():
    updates = one_update(optim.make_optimizer(config()), PARAMS, GRADS)
    np.testing.assert_allclose(updates["layer.kernel"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["layer.bias"], 0.01, rtol=1e-5)


def test_weight_decay_pulls_on_matrices_only():
    params = PARAMS | {
        "norm.scale": jnp.ones(4),
        "embedding.embedding": jnp.ones((5, 2)),
        "logit_scale": jnp.ones(()),
        "blocks.*.norm.bias": jnp.ones((7, 4)),  # seven biases, stacked
        "blocks.*.kernel": jnp.ones((7, 4, 4)),
    }
    optimizer = optim.make_optimizer(config(weight_decay=0.1))
    updates = one_update(optimizer, params, jax.tree.map(jnp.zeros_like, params))
    decayed = {name for name, x in updates.items() if np.any(np.asarray(x))}
    assert decayed == {"layer.kernel", "embedding.embedding", "blocks.*.kernel"}
    np.testing.assert_allclose(updates["layer.kernel"], -0.01 * 0.1, rtol=1e-6)


def test_clip_bounds_the_norm_of_all_gradients_together():
    # An eps that dwarfs the gradient makes Adam's first update proportional to it.
    clipped = one_update(optim.make_optimizer(config(clip_norm=0.1, eps=1e3)), PARAMS, GRADS)
    free = one_update(optim.make_optimizer(config(eps=1e3)), PARAMS, GRADS)
    norm = float(optim.global_norm(GRADS))
    for name in PARAMS:
        np.testing.assert_allclose(clipped[name], free[name] * 0.1 / norm, rtol=2e-3)


def test_betas_are_used():
    optimizer = optim.make_optimizer(config(b1=0.0, b2=0.95))
    adam = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[1][1][0]
    np.testing.assert_allclose(adam.mu["layer.bias"], -2.0, rtol=1e-6)
    np.testing.assert_allclose(adam.nu["layer.bias"], 0.05 * 4.0, rtol=1e-5)


def test_schedules():
    rate = optim.learning_rate_schedule(config(warmup_steps=4))
    expected = [2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2]
    np.testing.assert_allclose([rate(i) for i in range(5)], expected, rtol=1e-6)
    np.testing.assert_allclose(rate(99), 1e-2, rtol=1e-6)

    rate = optim.learning_rate_schedule(config(warmup_steps=20, schedule="cosine"))
    np.testing.assert_allclose(rate(20), 1e-2, rtol=1e-6)
    np.testing.assert_allclose(rate(60), 5e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.0, atol=1e-9)
    np.testing.assert_allclose(rate(150), 0.0, atol=1e-9)
    assert rate(jnp.int32(3)).dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(60)), rate(60), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "cosin"}, "'cosin' is unknown; use cosine"),
        ({"schedule": "x"}, "use constant or cosine"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"b2": 1.0}, "b2=1.0 must be at least 0 and below 1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_bad_config(changes, said):
    with pytest.raises(InputError, match=said):
        optim.make_optimizer(config(**changes))


def test_all_updates_of_a_step_have_one_rate():
    optimizer = optim.make_optimizer(config(learning_rate=4.0, warmup_steps=4), updates=2)
    update, state, rates = jax.jit(optimizer.update), optimizer.init(PARAMS), []
    for _ in range(4):
        updates, state = update(GRADS, state, PARAMS)
        rates.append(float(updates["layer.bias"][0]))
    np.testing.assert_allclose(rates, [1, 1, 2, 2], rtol=1e-4)


def test_langevin_adds_noise_of_the_right_size():
    params = {"a.kernel": jnp.zeros((200, 200)), "b.kernel": jnp.zeros((200, 200))}
    updates = {name: jnp.full(x.shape, 0.25) for name, x in params.items()}
    noise = optim.langevin(2.0, optim.learning_rate_schedule(config()), seed=0)
    update = jax.jit(noise.update)
    first, state = update(updates, noise.init(params))
    second, _ = update(updates, state)
    samples = [np.asarray(x[name]) - 0.25 for x in (first, second) for name in params]
    for sample in samples:
        np.testing.assert_allclose(sample.std(), np.sqrt(2 * 1e-2 * 2.0), rtol=0.02)
        np.testing.assert_allclose(sample.mean(), 0.0, atol=0.005)
    correlations = np.corrcoef([sample.ravel() for sample in samples])
    assert np.all(np.abs(correlations - np.eye(4)) < 0.03)


def test_langevin_follows_the_rate_and_the_seed():
    params = {"a.kernel": jnp.zeros((50, 50))}
    rate = optim.learning_rate_schedule(config(warmup_steps=100))
    update = [jax.jit(optim.langevin(1.0, rate, seed).update) for seed in (0, 1)]

    def sample(seed, count):
        return update[seed](params, optim.LangevinState(jnp.int32(count)))[0]["a.kernel"]

    np.testing.assert_allclose(np.std(sample(0, 99)) / np.std(sample(0, 0)), 10.0, rtol=0.1)
    assert np.array_equal(sample(0, 5), sample(0, 5))
    assert not np.array_equal(sample(0, 5), sample(1, 5))


def test_langevin_is_last_in_the_chain_and_absent_at_zero():
    without = optim.make_optimizer(config(clip_norm=1e-3)).init(PARAMS)
    assert not any(isinstance(x, optim.LangevinState) for x in without)
    assert jax.tree.structure(without) == jax.tree.structure(
        optim.make_optimizer(config(), temperature=0.0).init(PARAMS)
    )
    # Neither the clip nor Adam's normalization touches the noise.
    hot = optim.make_optimizer(config(clip_norm=1e-3), temperature=1e4)
    assert isinstance(hot.init(PARAMS)[-1], optim.LangevinState)
    noise = optim.langevin(1e4, optim.learning_rate_schedule(config()), seed=0)
    alone = one_update(noise, PARAMS, jax.tree.map(jnp.zeros_like, PARAMS))
    together = one_update(hot, PARAMS, GRADS)
    cold = one_update(optim.make_optimizer(config(clip_norm=1e-3)), PARAMS, GRADS)
    for name in PARAMS:
        np.testing.assert_allclose(together[name], alone[name] + cold[name], rtol=1e-5)
    with pytest.raises(InputError, match="temperature=-1"):
        optim.make_optimizer(config(), temperature=-1.0)


def test_langevin_does_not_depend_on_the_sharding():
    params = {"a.kernel": jnp.zeros((1024, 2048)), "b.bias": jnp.zeros(16)}
    optimizer = optim.make_optimizer(config(), temperature=1.0)
    update = lambda: one_update(optimizer, params, params)  # noqa: E731
    whole = jax.jit(update)()
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    where = sharding.param_sharding(jax.eval_shape(update), mesh, [(".*", "fsdp")])
    assert where["a.kernel"].spec == PartitionSpec(None, "fsdp")
    split = jax.jit(update, out_shardings=where)()
    for name in params:
        assert np.array_equal(whole[name], split[name])
    assert not np.array_equal(whole["a.kernel"][0, :16], whole["b.bias"])


def test_ema():
    ema, params = {"x": jnp.float32(1.0)}, {"x": jnp.float32(3.0)}
    np.testing.assert_allclose(optim.update_ema(ema, params, 0.75)["x"], 1.5)
    assert optim.update_ema(ema, {"x": jnp.float32(0.1)}, 0.0)["x"] == jnp.float32(0.1)
    assert optim.update_ema(ema, params, 1.0)["x"] == ema["x"]
    assert optim.update_ema(ema, params, 0.9)["x"].dtype == jnp.float32


def test_global_norm_is_float32_whatever_the_leaves():
    tree = {"a": jnp.full(10_000, 0.1, jnp.bfloat16), "b": jnp.full((2, 2), 3.0)}
    norm = optim.global_norm(tree)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.sqrt(10_000 * 0.1**2 + 4 * 9), rtol=2e-3)
    assert optim.global_norm({}) == 0.0


def train(optimizer, state, grads):
    grads_norm = optim.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optim.update_ema(state.ema_params, params, 0.5)
    new = state._replace(
        step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    )
    return optim.skip_if_nonfinite(state, new, grads_norm)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    optimizer = optim.make_optimizer(config(), temperature=0.1)
    step = jax.jit(lambda state, grads: train(optimizer, state, grads))
    counts = lambda s: [int(s.step), int(s.skipped), int(s.skipped_in_a_row)]  # noqa: E731
    dtypes = lambda s: [x.dtype for x in jax.tree.leaves(s)]  # noqa: E731
    good = step(train_state.init(PARAMS, optimizer), GRADS)
    assert counts(good) == [1, 0, 0]
    assert not np.array_equal(good.params["layer.kernel"], PARAMS["layer.kernel"])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        nonfinite = GRADS | {"layer.bias": GRADS["layer.bias"].at[0].set(bad)}
        skipped = step(step(good, nonfinite), nonfinite)
        assert counts(skipped) == [3, 2, 2]
        for field in ("params", "ema_params", "opt_state"):
            old, new = (jax.tree.leaves(getattr(s, field)) for s in (good, skipped))
            assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))
        assert dtypes(skipped) == dtypes(good)
        assert counts(step(skipped, GRADS)) == [4, 2, 0]
