"""The losses that R0 does without, against PyTorch twins: values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_world
import torch
import torch_losses
from ml_collections import ConfigDict
from step_world import SCHEDULER, assert_close, batch, sample_keys

from r0_jax.diffusion import grid, rollout
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.method import directions, fake_score
from r0_jax.method.context import Context
from r0_jax.method.reward_step import Drawn
from r0_jax.parallel import sharding
from r0_jax.training.program import sharding_of_state
from r0_jax.workdir.checkpoint_manager import Checkpoints
from r0_jax.workdir.workdir import LocalWorkdir

B, SHAPE = 3, (2, 3, 4)
ROOT = np.sqrt(np.prod(SHAPE))
KINDS = ("epsilon", "v_prediction", "flow")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": torch_losses.SHIFT}


def network(xp, speed, shift):
    """A network of jax.numpy or torch: its output depends on all that it is told."""

    def output(latents, timesteps, prompted=True):
        time = timesteps[:, None, None, None] / 700
        turned = xp.flip(latents, (-1,))
        return xp.sin(speed * turned + time + (shift if prompted else -shift))

    return output


def teacher(xp):
    return network(xp, 1.7, 0.8)


def student(xp):
    return network(xp, 1.1, 0.3)


def context(kind, timestep):
    """A graded call at a timestep, as both sides see it: the context, and x0 and z in float64."""
    rng = np.random.default_rng(0)
    x0, z = (rng.standard_normal((B, *SHAPE)) for _ in range(2))
    given = FLOW if kind == "flow" else SCHEDULER | {"prediction_type": kind}
    config = SchedulerConfig.from_json(given)
    table = grid.noise_levels(config)
    i = 999 - timestep
    at = rollout.Trajectory(
        jnp.asarray(z, jnp.float32),
        jnp.full(B, jnp.float32(table.timesteps[i])),
        jnp.asarray(table.alphas)[i],
        jnp.asarray(table.sigmas)[i],
        jnp.asarray(x0, jnp.float32),
    )
    base, target = teacher(jnp), student(jnp)

    def base_pair(latents, timesteps):
        return base(latents, timesteps), base(latents, timesteps, False)

    made = Context(
        at, sample_keys(B), base, base_pair, base, target, table, fake=network(jnp, 1.3, 0.5)
    )
    return made, torch.tensor(x0, requires_grad=True), torch.tensor(z)


def assert_same(loss, direction, expected, x0):
    """A value, and the direction of its descent in the unit of directions.py."""
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-4)
    (gradient,) = torch.autograd.grad(expected.sum(), x0)
    found = -2 / ROOT * np.asarray(direction)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=2e-5)
    assert np.abs(found).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "timestep", "form"),
    [(kind, 499, "huber") for kind in KINDS]
    + [("epsilon", 499, "l2"), ("epsilon", 999, "huber")]
    + [("v_prediction", 19, "huber")],  # from where RG-LCM's step ends at 0
)
def test_consistency_is_rg_lcms(kind, timestep, form):
    made, x0, z = context(kind, timestep)
    options = ConfigDict({"least": 5.0, "most": 15.0, "skip": 0.02, "form": form, "c": 0.05})
    w = 5 + 10 * np.asarray(rollout.uniform(made.keys, 300), np.float64)
    expected = torch_losses.rg_lcm(
        kind,
        x0,
        z,
        torch.full((B,), timestep),
        torch.tensor(w),
        teacher(torch),
        student(torch),
        c=0.05,
        form=form,
    )
    loss = directions.consistency_loss(made, options)(made.x0)
    assert_same(loss, directions.consistency(made, options), expected, x0)


def test_the_target_network_is_the_generator_or_its_average():
    on = {
        "sampler.num_steps": 1,
        "objective.grad_steps": 1,
        "regularizers.consistency.weight": 1.0,
    }
    now = step_world.make(on, rewards=[])
    average = step_world.make(on | {"regularizers.consistency.target": "ema"}, rewards=[])
    _, state, _ = now.step()
    state = state._replace(ema_params=jax.tree.map(lambda x: 0.5 * x, state.params))
    assert now.objective.read(state) == {}
    read = average.objective.read(state)
    assert read["ema"] is state.ema_params

    program = average.program()  # the average is an argument, so it may be any
    (_, _), same = program(
        state.params, average.frozen | {"ema": state.params}, batch(B), sample_keys(B), Drawn(0), {}
    )
    (_, _), expected = now.value_and_grad(state.params, batch(B), 0)
    assert_close(same, expected, 1e-6)
    (_, _), other = program(
        state.params, average.frozen | read, batch(B), sample_keys(B), Drawn(0), {}
    )
    worst = max(np.abs(other[k] - same[k]).max() for k in same)
    assert worst > 1e-3 * max(np.abs(x).max() for x in same.values())


# --- Score: an integral KL, and the fake that it needs --------------------------------------------


def draws(keys, least, most, tag):
    """Timesteps and noise of `Context.renoise`, for torch."""
    share = least + (most - least) * np.asarray(rollout.uniform(keys, tag), np.float64)
    t = 999 - np.clip(np.floor((1 - share) * 1000), 0, 999)
    noise = np.asarray(rollout.normal(keys, tag + 1, SHAPE), np.float64)
    return torch.tensor(t), torch.tensor(noise)


def options(**fields):
    return ConfigDict({"form": "kl", "scale": 4.5, "least": 0.02, "most": 0.98} | fields)


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_dmds(kind):
    made, x0, _ = context(kind, 499)
    t, n = draws(made.keys, 0.02, 0.98, 400)
    expected = torch_losses.dmd(kind, x0, t, n, teacher(torch), network(torch, 1.3, 0.5), 4.5)
    direction = directions.score(made, options())
    # Twice the gradient of half the square: the loss is half the mean square of that gradient.
    assert_same(np.sum(np.square(direction), (1, 2, 3)) / 2, direction / 2, expected, x0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_scores_is_sids(kind):
    made, x0, _ = context(kind, 499)
    t, n = draws(made.keys, 0.02, 0.98, 400)
    expected = torch_losses.sid(kind, x0, t, n, teacher(torch), network(torch, 1.3, 0.5), 4.5)
    sim = options(form="sim")
    value = directions.score_divergence(made, sim, made.x0)
    assert_same(value, directions.score(made, sim) / 2, expected, x0)


def test_without_guidance_the_base_is_called_with_the_prompt_alone():
    made, _, _ = context("epsilon", 499)
    plain = directions.score(made, options(scale=1.0))
    both = directions.score(made, options(scale=1.0 + 1e-6))
    np.testing.assert_allclose(plain, both, atol=1e-5)
    alone = dataclasses.replace(made, base_pair=lambda latents, timesteps: 1 / 0)
    np.testing.assert_array_equal(plain, directions.score(alone, options(scale=1.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_learns_to_denoise_what_is_drawn(kind):
    made, x0, _ = context(kind, 499)
    t, n = draws(made.keys, 0.0, 1.0, 500)
    expected = torch_losses.denoising(kind, x0, t, n, network(torch, 1.3, 0.5))
    found = fake_score.denoising_loss(made)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4)


SCORE = {
    "sampler.num_steps": 1,
    "objective.grad_steps": 1,
    "device_batch": 4,
    "regularizers.score.weight": 0.5,
    "regularizers.score.rank": 3,
    "regularizers.score.updates": 2,
    "regularizers.score.learning_rate_ratio": 0.3,
}
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def trained():
    """(world, run, states of three steps, metrics of the first), in two microbatches."""
    world = step_world.make(SCORE)
    run, state, _ = world.step()
    states, metrics = [state], []
    for _ in range(3):
        state, found = run(states[-1], batch(8), KEY)
        states.append(state)
        metrics.append(found)
    return world, run, states, metrics[0]


def keys_of(key):
    _, sample_key = jax.random.split(jax.random.fold_in(key, 0))
    return jax.vmap(jax.random.fold_in, (None, 0))(sample_key, jnp.arange(8))


def test_a_step_updates_the_fake_on_its_own_images_and_then_on_new_ones(trained):
    world, _, (before, after, *_), metrics = trained
    objective, frozen = world.objective, world.frozen | {"fake": before.fake.params}
    grad = jax.jit(jax.value_and_grad(objective.fake_loss))
    (value, _), grads = world._replace(frozen=frozen).value_and_grad(
        before.params, batch(8), 0, keys_of(KEY)
    )
    loss, first = grad(before.fake.params, before.params, frozen, batch(8), keys_of(KEY), Drawn(0))
    fake = objective.fake.update(before.fake, first)
    again = keys_of(jax.random.fold_in(KEY, 1))
    _, second = grad(fake.params, after.params, frozen, batch(8), again, Drawn(0))
    fake = objective.fake.update(fake, second)
    assert_close(after.fake, fake, 1e-4)
    np.testing.assert_allclose(metrics["train/fake_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["norm/fake_grads"], global_norm(first), rtol=1e-4)
    np.testing.assert_allclose(metrics["norm/grads"], global_norm(grads), rtol=1e-4)
    np.testing.assert_allclose(metrics["train/loss"], value, rtol=1e-4)


def test_the_loss_of_the_fake_neither_shows_in_the_loss_nor_trains_the_generator():
    world = step_world.make(SCORE, rewards=[])
    shapes = world.pipeline.networks["unet"].shapes
    start = world.objective.fake.init(jax.random.key(4), world.frozen["base"], shapes)
    frozen = world.frozen | {"fake": start.params}  # it equals the base, so nothing pulls
    (loss, metrics), grads = world._replace(frozen=frozen).value_and_grad(
        world.params(), batch(B), 0
    )
    assert metrics["train/fake_loss"] > 0.1 and metrics["norm/x0/score"] == 0
    assert loss == 0 and not any(np.any(x) for x in grads.values())


def global_norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def test_the_loss_of_the_fake_falls(trained):
    world, _, (first, *_, last), _ = trained
    loss = jax.jit(world.objective.fake_loss)
    losses = [
        loss(state.fake.params, first.params, world.frozen, batch(8), sample_keys(8), Drawn(0))
        for state in (first, last)
    ]
    assert losses[1] < 0.98 * losses[0]


def test_a_restored_fake_continues_to_the_bit(trained, tmp_path):
    _, run, (_, first, second, _), _ = trained
    with Checkpoints(LocalWorkdir(tmp_path)) as checkpoints:
        checkpoints.save(first)
        checkpoints.wait()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first
        )
        restored, _ = checkpoints.restore(target)
    assert_close(run(restored, batch(8), KEY)[0], second, 0)


def test_a_step_that_poisons_the_fake_is_skipped(trained):
    _, run, (_, first, *_), _ = trained
    name = "conv_out.lora_A.kernel"
    poisoned = first.fake.params | {name: first.fake.params[name] * np.nan}
    state = first._replace(fake=first.fake._replace(params=poisoned))
    after, _ = run(state, batch(8), KEY)
    assert after.skipped == 1
    assert_close(after.params, first.params, 0)


def test_the_fake_is_split_as_the_generator_is(trained, monkeypatch):
    _, _, (state, *_), _ = trained
    monkeypatch.setattr(sharding, "_MIN_BYTES", 0)
    shapes = jax.eval_shape(lambda: state)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    rules = step_world.config().sharding
    found = sharding_of_state(shapes, mesh, rules)
    split = {k: x.spec for k, x in found.fake.params.items()}
    assert split == {k: x.spec for k, x in found.params.items()}
    assert any("fsdp" in spec for spec in split.values())
    adam = found.fake.opt_state[1][0]
    assert {k: x.spec for k, x in adam.mu.items()} == split
