import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from r0_jax.diffusion import grid, schedulers
from r0_jax.diffusion import rollout as rollout_
from r0_jax.diffusion.scheduler_config import SchedulerConfig

parse = SchedulerConfig.from_json
BATCH, SHAPE = 4, (2, 3, 2)
SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EULER = {**SD, "_class_name": "EulerDiscreteScheduler"}


def few_steps(prediction_type="epsilon"):
    return grid.grid(parse(SD | {"prediction_type": prediction_type}), 4)


def network(theta, latents, timesteps):
    """Anything smooth that mixes latents, time and a parameter."""
    return jnp.sin(latents[..., ::-1] * theta + timesteps[:, None, None, None] / 500)


def keys(size=BATCH):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(size))


def start(size=BATCH):
    return jax.random.normal(jax.random.key(1), (8, *SHAPE))[:size]


def trajectory(theta, frozen, scheduler, last, grad_steps, eta):
    return rollout_.rollout(
        functools.partial(network, theta),
        functools.partial(network, frozen),
        scheduler,
        start(),
        keys(),
        last=last,
        grad_steps=grad_steps,
        random_eta=False,
        eta=eta,
    )


@functools.partial(jax.jit, static_argnames=("scheduler", "grad_steps"))
def rollout(scheduler, last, grad_steps):
    return trajectory(1.3, 1.3, scheduler, last, grad_steps, eta=0.0)


@pytest.mark.parametrize(
    "config",
    [
        grid.exported(parse(SD), 4),
        grid.exported(parse(SD | {"prediction_type": "v_prediction"}), 4),
        parse(SD3),
        parse(EULER),
    ],
    ids=["epsilon", "v", "flow", "euler"],
)
def test_eta_0_is_the_scheduler_over_the_whole_trajectory(config):
    scheduler = schedulers.from_config(config, 4)
    latents = start() * scheduler.init_noise_sigma
    for i in range(4):
        timesteps = jnp.full(BATCH, float(scheduler.timesteps[i]))
        output = network(1.3, scheduler.scale_model_input(latents, i), timesteps)
        before = latents
        latents, _ = scheduler.step(output, latents, i, scheduler.init_state(latents))
    found = rollout(scheduler, 3, grad_steps=2)
    size = float(jnp.abs(latents).max())
    np.testing.assert_allclose(found.x0, latents, atol=1e-5 * size)
    np.testing.assert_allclose(found.latents, before, atol=1e-5 * size)
    np.testing.assert_array_equal(found.timesteps, np.full(BATCH, scheduler.timesteps[3]))


def test_trajectory_stops_at_last():
    """As R0+ needs it: `last` is traced."""
    scheduler, epsilon = few_steps(), functools.partial(network, 1.3)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    for last in range(4):
        found = rollout(scheduler, last, grad_steps=1)
        assert (found.timesteps == scheduler.timesteps[last]).all()
        assert (found.alpha, found.sigma) == (scheduler.alphas[last], scheduler.sigmas[last])
        expected = found.latents - found.sigma * epsilon(found.latents, found.timesteps)
        np.testing.assert_allclose(found.x0, expected / found.alpha, rtol=1e-4, atol=1e-4)
        if last == 0:
            np.testing.assert_allclose(found.latents, start(), rtol=1e-6)
        else:
            assert jnp.abs(found.latents - start()).max() > 0.1


def test_only_the_steps_needed_are_run():
    calls = []

    def counted(latents, timesteps):
        jax.debug.callback(lambda t: calls.append(int(t)), timesteps[0])
        return network(1.3, latents, timesteps)

    @functools.partial(jax.jit)
    def run(last):
        return rollout_.rollout(
            counted,
            counted,
            few_steps(),
            start(),
            keys(),
            last=last,
            grad_steps=1,
            random_eta=False,
            eta=0.0,
        ).x0

    for last in range(4):
        calls.clear()
        jax.block_until_ready(run(jnp.asarray(last)))
        jax.effects_barrier()
        assert calls == [999, 749, 499, 249][: last + 1]


def test_step_keeps_the_variance_and_eta_1_replaces_all_noise():
    scheduler = few_steps()
    latents, output, noise = (jax.random.normal(jax.random.key(i), (2, *SHAPE)) for i in range(3))
    x0, epsilon = scheduler.x0_and_epsilon(output, latents, 1)
    etas = jnp.asarray([1.0, 0.6])
    found, clean = rollout_.step(scheduler, output, latents, 1, etas, noise)
    np.testing.assert_allclose(clean, x0, rtol=1e-6)
    alpha, sigma = scheduler.next_alphas[1], scheduler.next_sigmas[1]
    np.testing.assert_allclose(found[0], alpha * x0[0] + sigma * noise[0], rtol=1e-5, atol=1e-5)
    expected = alpha * x0[1] + sigma * (0.8 * epsilon[1] + 0.6 * noise[1])
    np.testing.assert_allclose(found[1], expected, rtol=1e-5, atol=1e-5)
    # The last step ends at sigma = 0.
    np.testing.assert_allclose(
        *rollout_.step(scheduler, output, latents, 3, etas, noise), rtol=1e-6
    )


@pytest.fixture
def drawn(monkeypatch):
    """What every step of a rollout was given: {(i, sample): (eta, noise)}."""
    record, step = {}, rollout_.step

    def note(i, eta, noise):
        for sample, (e, n) in enumerate(zip(eta, noise, strict=True)):
            record[int(i), sample] = (float(e), np.asarray(n))

    def spy(scheduler, model_output, latents, i, eta, noise):
        jax.debug.callback(note, i, eta, noise)
        return step(scheduler, model_output, latents, i, eta, noise)

    monkeypatch.setattr(rollout_, "step", spy)
    return record


def run(size, random_eta, eta=0.0):
    denoise = functools.partial(network, 1.3)
    found = jax.jit(
        functools.partial(
            rollout_.rollout,
            denoise,
            denoise,
            few_steps(),
            last=3,
            grad_steps=2,
            random_eta=random_eta,
            eta=eta,
        )
    )(start(size), keys(size))
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found


def test_random_eta_is_drawn_for_each_step_of_each_sample(drawn):
    run(8, random_eta=True)
    etas = np.asarray([drawn[i, sample][0] for i in range(4) for sample in range(8)])
    assert len(np.unique(etas)) == 32 and etas.min() >= 0 and etas.max() <= 1
    assert etas.min() < 0.2 and etas.max() > 0.8 and abs(etas.mean() - 0.5) < 0.15
    noise = np.asarray([drawn[key][1].ravel() for key in sorted(drawn)])
    assert np.abs(np.corrcoef(noise) - np.eye(32)).max() < 0.95  # 12 numbers each: no two alike
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    # Nor is the noise the one that the rollout started from.
    starts = np.asarray(start(8)).reshape(8, -1)
    assert np.abs(noise[:, None] - starts[None]).max(-1).min() > 0.1


def test_without_random_eta_all_take_the_one_given(drawn):
    run(4, random_eta=False, eta=0.25)
    assert {eta for eta, _ in drawn.values()} == {0.25} and len(drawn) == 16


def test_draws_do_not_depend_on_the_batch(drawn):
    whole = run(8, random_eta=True)
    of_whole = dict(drawn)
    part = run(4, random_eta=True)
    for key in [(i, sample) for i in range(4) for sample in range(4)]:
        assert drawn[key][0] == of_whole[key][0]
        np.testing.assert_array_equal(drawn[key][1], of_whole[key][1])
    np.testing.assert_allclose(part.x0, whole.x0[:4], rtol=1e-5, atol=1e-5)


def test_normal_and_uniform_by_sample_and_tag():
    a, b = rollout_.normal(keys(3), 0, (1000,)), rollout_.normal(keys(3), 1, (1000,))
    rows = np.concatenate([a, b])
    np.testing.assert_allclose(np.corrcoef(rows), np.eye(6), atol=0.12)
    np.testing.assert_allclose([rows.mean(), rows.std()], [0, 1], atol=0.05)
    np.testing.assert_array_equal(rollout_.normal(keys(2), 1, (1000,)), b[:2])
    many = rollout_.uniform(keys(4000), 5)
    np.testing.assert_allclose([many.min(), many.mean(), many.max()], [0, 0.5, 1], atol=0.02)


@pytest.mark.parametrize(("last", "grad_steps"), [(3, 4), (3, 2), (1, 1)])
def test_gradient_flows_through_the_last_steps_only(last, grad_steps):
    scheduler, eta, theta = few_steps("v_prediction"), 0.5, 1.3
    noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys(), 1)
    noise = [rollout_.normal(noise_keys, i, SHAPE) for i in range(4)]

    def unrolled(theta):
        latents = start()
        for i in range(last + 1):
            graded = i > last - grad_steps
            latents = latents if graded else jax.lax.stop_gradient(latents)
            latents = jax.lax.stop_gradient(latents) if i == last + 1 - grad_steps else latents
            t = theta if graded else jax.lax.stop_gradient(theta)
            output = network(t, latents, jnp.full(BATCH, float(scheduler.timesteps[i])))
            alpha, sigma = scheduler.alphas[i], scheduler.sigmas[i]
            x0 = alpha * latents - sigma * output
            epsilon = sigma * latents + alpha * output
            epsilon = np.sqrt(1 - eta**2) * epsilon + eta * noise[i]
            latents = scheduler.next_alphas[i] * x0 + scheduler.next_sigmas[i] * epsilon
        return jnp.sum(x0**2)

    def ours(theta, frozen, last):
        return jnp.sum(trajectory(theta, frozen, scheduler, last, grad_steps, eta).x0 ** 2)

    compiled = jax.jit(jax.value_and_grad(ours, (0, 1)))
    value, (gradient, frozen) = compiled(theta, theta, last)  # traced, as in R0+
    compiled = jax.jit(jax.value_and_grad(unrolled))
    expected, expected_gradient = compiled(theta)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4)
    assert frozen == 0 and gradient != 0


# --- Relatives that keep many steps, against PyTorch ----------------------------------------------

FAMILIES = {
    "epsilon": SD,
    "v": SD | {"prediction_type": "v_prediction"},
    "flow": SD3,
}


def twin(theta, latents, timestep):
    return torch.sin(latents.flip(-1) * theta + timestep / 500)


def twin_x0_and_epsilon(scheduler, output, x, i):
    alpha, sigma = float(scheduler.alphas[i]), float(scheduler.sigmas[i])
    match scheduler.prediction_type:
        case "epsilon":
            return (x - sigma * output) / alpha, output
        case "v_prediction":
            return alpha * x - sigma * output, alpha * output + sigma * x
        case "flow_prediction":
            return x - sigma * output, x + alpha * output


def twin_of_drtune(theta, scheduler, last, graded, eta):
    """DRTune, step by step: inputs are detached, and outputs too but for the graded ones."""
    noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys(), 1)
    x = torch.tensor(np.asarray(start(), np.float64))
    for i in range(last + 1):
        output = twin(theta, x.detach(), float(scheduler.timesteps[i]))
        output = output if i in graded else output.detach()
        x0, epsilon = twin_x0_and_epsilon(scheduler, output, x, i)
        noise = torch.tensor(np.asarray(rollout_.normal(noise_keys, i, SHAPE), np.float64))
        epsilon = (1 - eta**2) ** 0.5 * epsilon + eta * noise
        x = float(scheduler.next_alphas[i]) * x0 + float(scheduler.next_sigmas[i]) * epsilon
    return x0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("last", "graded", "eta"), [(7, (1, 4, 7), 0.0), (5, (0, 2, 4), 0.6), (6, (0, 1, 2), 1.0)]
)
def test_gradients_flow_through_outputs_alone(family, last, graded, eta):
    scheduler = grid.grid(parse(FAMILIES[family]), 8)
    weights = np.sin(np.arange(BATCH * np.prod(SHAPE))).reshape(BATCH, *SHAPE)

    @jax.jit
    def found(theta, last, graded):
        def value(theta):
            return jnp.sum(
                weights
                * rollout_.rollout_by_outputs(
                    functools.partial(network, theta),
                    functools.partial(network, jax.lax.stop_gradient(theta)),
                    scheduler,
                    start(),
                    keys(),
                    last=last,
                    graded=graded,
                    random_eta=False,
                    eta=eta,
                ).x0
            )

        return jax.value_and_grad(value)(theta)

    value, gradient = found(1.3, jnp.asarray(last), jnp.asarray(graded))
    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    expected = (torch.tensor(weights) * twin_of_drtune(theta, scheduler, last, graded, eta)).sum()
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-3)
    assert float(gradient) == pytest.approx(float(theta.grad), rel=2e-4, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_call_made_again_under_fresh_noise(family):
    """DRaFT-LV: no gradient flows through the image that is noised."""
    scheduler = grid.grid(parse(FAMILIES[family]), 4)
    weights = np.cos(np.arange(3 * BATCH * np.prod(SHAPE))).reshape(3 * BATCH, *SHAPE)

    def draw(theta):
        denoise = functools.partial(network, theta)
        first = trajectory(theta, 1.3, scheduler, 3, 1, 0.0)
        return first, rollout_.noised_anew(denoise, scheduler, first, keys(), 3, 2)

    first, found = jax.jit(draw)(1.3)
    value, gradient = jax.jit(jax.value_and_grad(lambda t: jnp.sum(weights * draw(t)[1].x0)))(1.3)
    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for sample in range(BATCH):
        x = torch.tensor(np.asarray(first.latents[sample], np.float64))
        for again in range(3):
            if again:
                noise = rollout_.normal(keys(), again - 1, SHAPE)[sample]
                clean = torch.tensor(np.asarray(first.x0[sample], np.float64))
                x = float(first.alpha) * clean + float(first.sigma) * torch.tensor(
                    np.asarray(noise, np.float64)
                )
            output = twin(theta, x, float(scheduler.timesteps[3]))
            x0, _ = twin_x0_and_epsilon(scheduler, output, x, 3)
            row = 3 * sample + again
            np.testing.assert_allclose(found.x0[row], x0.detach(), atol=1e-4)
            expected = expected + (torch.tensor(weights[row]) * x0).sum()
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-4)
    assert float(gradient) == pytest.approx(float(theta.grad), rel=1e-4, abs=1e-4)


def test_the_bound_is_one_of_each_sample():
    scheduler, bound = few_steps(), 0.05

    def value(theta, latents, bound):
        def two(latents, i):
            after, x0 = rollout_.step(
                scheduler, network(theta, latents, timesteps(i)), latents, i, etas, noise
            )
            return after, x0

        etas, noise = jnp.zeros(BATCH), jnp.zeros((BATCH, *SHAPE))
        _, x0 = two(rollout_._bounded(two(latents, 2)[0], bound), 3)
        return jnp.sum(jnp.arange(1.0, 1 + BATCH)[:, None, None, None] * x0)

    def timesteps(i):
        return jnp.full(BATCH, float(scheduler.timesteps[i]))

    grad = jax.jit(jax.grad(value, argnums=1), static_argnums=2)
    free, kept = (grad(1.3, start(), x) for x in (1e9, bound))
    ratio = np.asarray(kept / free).reshape(BATCH, -1)
    # Each sample is scaled down by a factor of its own; larger weights are scaled down more.
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones_like(ratio), rtol=1e-3)
    assert (ratio[:, 0] < 1).all() and ratio[3, 0] < ratio[0, 0]
