import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from step_world import SCHEDULER, sample_keys

from r0_jax.config import get_config
from r0_jax.diffusion import grid, rollout
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.method import penalties, regularizers
from r0_jax.method.context import Context

B, SHAPE = 3, (2, 3, 4)
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.sqrt(np.cumprod(1 - BETAS))  # of timesteps 0 to 999
SIGMAS = np.sqrt(1 - ALPHAS**2)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), (*shape,))


def base(latents, timesteps, prompted=True):
    """A network's output: it depends on all it is told."""
    time = timesteps[:, None, None, None] / 700
    return jnp.sin(1.7 * latents[..., ::-1] + time + (0.8 if prompted else -0.4))


def base_pair(latents, timesteps):
    return base(latents, timesteps), base(latents, timesteps, prompted=False)


def base_features(latents, timesteps):
    return jnp.cos(latents[:, :, :2] * 2 + timesteps[:, None, None, None] / 300)


def context(x0=None, prediction_type="epsilon", base_pair=base_pair, batch=B):
    at = rollout.Trajectory(
        normal(0, 8, *SHAPE)[:batch],
        jnp.full(batch, 499.0),
        jnp.float32(ALPHAS[499]),
        jnp.float32(SIGMAS[499]),
        normal(1, 8, *SHAPE)[:batch] if x0 is None else x0,
    )
    config = SchedulerConfig.from_json(SCHEDULER | {"prediction_type": prediction_type})
    return Context(
        at,
        sample_keys(batch),
        base,
        base_pair,
        base_features,
        lambda: jnp.float32(7.0),
        grid.noise_levels(config),
    )


def clean(output, latents, alpha, sigma, prediction_type):
    if prediction_type == "epsilon":
        return (latents - sigma * output) / alpha
    return alpha * latents - sigma * output


def options(**fields):
    return ConfigDict({"weight": 1.0, "least": 0.02, "most": 0.98, "scale": 3.5} | fields)


def test_every_penalty_of_the_config_is_known():
    known = {*regularizers.PENALTIES, *regularizers.ELSEWHERE}
    assert known == set(get_config().regularizers)


def test_weight_is_the_squared_distance():
    assert penalties.weight(context(), options()) == 7


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_output_is_the_distance_to_the_bases_x0_at_the_same_input(prediction_type):
    at = context().trajectory
    output = base(at.latents, at.timesteps)
    reference = clean(output, at.latents, ALPHAS[499], SIGMAS[499], prediction_type)
    expected = np.mean((at.x0 - reference) ** 2)
    found = penalties.output(context(prediction_type=prediction_type), options())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def gradient(penalty, **fields):
    """Of a penalty with respect to x0, and to the base's latents."""

    def value(x0, latents):
        made = context(x0)
        moved = dataclasses.replace(made, trajectory=made.trajectory._replace(latents=latents))
        return penalty(moved, options(**fields))

    made = context()
    return jax.grad(value, (0, 1))(made.trajectory.x0, made.trajectory.latents)


def test_output_pulls_x0_alone():
    to_x0, to_latents = gradient(penalties.output)
    made = context()
    expected = 2 * (made.trajectory.x0 - made.base_x0) / made.trajectory.x0.size
    np.testing.assert_allclose(to_x0, expected, rtol=1e-5, atol=1e-7)
    assert not np.any(to_latents)


def renoised(x0, least, most, tag, keys):
    """By method.md: one level a sample, alpha x0 + sigma noise."""
    share = least + (most - least) * np.asarray(rollout.uniform(keys, tag))
    timesteps = 999 - np.clip(np.floor((1 - share) * 1000), 0, 999).astype(int)
    alpha, sigma = (x[timesteps][:, None, None, None] for x in (ALPHAS, SIGMAS))
    noise = np.asarray(rollout.normal(keys, tag + 1, SHAPE))
    latents = (alpha * np.asarray(x0) + sigma * noise).astype(np.float32)
    return jnp.asarray(latents), jnp.asarray(timesteps.astype(np.float32)), alpha, sigma


def test_feature_is_the_relative_distance_on_both_renoised_outputs():
    made = context()
    total = 0
    features = []
    for x0 in (made.trajectory.x0, made.base_x0):
        latents, timesteps, _, _ = renoised(x0, 0.1, 0.6, 100, made.keys)
        features.append(np.asarray(base_features(latents, timesteps)))
    for ours, theirs in zip(*features, strict=True):
        total += np.mean((ours - theirs) ** 2) / np.mean(theirs**2)
    found = penalties.feature(made, options(least=0.1, most=0.6))
    np.testing.assert_allclose(found, total / B, rtol=1e-4)
    # The generator's own output is compared with the base's: equal ones cost nothing.
    assert penalties.feature(context(made.base_x0), options()) == 0


def test_feature_pulls_x0_alone():
    to_x0, to_latents = gradient(penalties.feature)
    assert np.abs(to_x0).max() > 1e-4 and not np.any(to_latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_is_the_formula(prediction_type):
    made = context(prediction_type=prediction_type)
    x0 = np.asarray(made.trajectory.x0)
    latents, timesteps, alpha, sigma = renoised(x0, 0.02, 0.98, 200, made.keys)
    cond, uncond = (
        clean(output, latents, alpha, sigma, prediction_type)
        for output in base_pair(latents, timesteps)
    )
    total = 0
    for a, b in zip(np.asarray(cond), np.asarray(uncond), strict=True):
        pull = 3.5 * (a - b)  # target - x0
        total += np.mean(pull**2) / np.mean(np.abs(pull))
    np.testing.assert_allclose(penalties.guidance(made, options()), total / B, rtol=1e-4)


def test_guidance_moves_x0_towards_the_prompt():
    """Descent goes along x0_cond - x0_uncond, of every element."""
    made = context()
    to_x0, _ = gradient(penalties.guidance)
    latents, timesteps, alpha, sigma = renoised(made.trajectory.x0, 0.02, 0.98, 200, made.keys)
    cond, uncond = (
        clean(output, latents, alpha, sigma, "epsilon") for output in base_pair(latents, timesteps)
    )
    direction = np.asarray(cond - uncond)
    for step, along in zip(-to_x0, direction, strict=True):
        cosine = np.sum(step * along) / (np.linalg.norm(step) * np.linalg.norm(along))
        assert cosine > 0.9999
    # The pull's size is about the same at any noise level: ||.||^2 over mean |.|.
    expected = 2 * 3.5 * direction / np.mean(np.abs(3.5 * direction), (1, 2, 3), keepdims=True)
    np.testing.assert_allclose(to_x0, -expected / to_x0.size, rtol=1e-3, atol=1e-6)


def test_guidance_of_a_base_that_ignores_the_prompt_is_nothing():
    deaf = context(base_pair=lambda latents, timesteps: (base(latents, timesteps),) * 2)
    assert penalties.guidance(deaf, options()) == 0


def test_renoising_levels_are_spread_between_their_bounds():
    made = context(batch=8)
    many = dataclasses.replace(made, keys=sample_keys(2000))
    x0 = jnp.broadcast_to(normal(3, 1, 1, 1, 2), (2000, 1, 1, 2))
    noised = many.renoise(x0, (0.2, 0.7), 100)
    timesteps = np.asarray(noised.timesteps)
    assert 199 <= timesteps.min() < 205 and 694 < timesteps.max() <= 700
    np.testing.assert_allclose(timesteps.mean(), 450, atol=10)
    at = timesteps.astype(int)
    np.testing.assert_allclose(noised.alpha.ravel(), ALPHAS[at], rtol=1e-5)
    np.testing.assert_allclose(noised.sigma.ravel(), SIGMAS[at], rtol=1e-5)
    noise = (noised.latents - noised.alpha * x0) / noised.sigma
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
    full = many.renoise(x0, (0.0, 1.0), 100).timesteps
    assert full.min() >= 0 and full.max() <= 999


def test_penalties_are_means_over_samples():
    """So that microbatches average to the large batch, whatever a sample's neighbours are."""
    for name, penalty in regularizers.PENALTIES.items():
        whole = penalty(context(batch=4), options())
        halves = []
        for rows in (slice(0, 2), slice(2, 4)):
            made = context(batch=4)
            at = made.trajectory
            part = at._replace(
                latents=at.latents[rows], timesteps=at.timesteps[rows], x0=at.x0[rows]
            )
            half = dataclasses.replace(made, trajectory=part, keys=made.keys[rows])
            halves.append(penalty(half, options()))
        np.testing.assert_allclose(whole, sum(halves) / 2, rtol=1e-5, err_msg=name)
