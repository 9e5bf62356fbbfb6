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
from r0_jax.method import directions, regularizers
from r0_jax.method.context import Context

B, SHAPE = 3, (2, 3, 4)
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.sqrt(np.cumprod(1 - BETAS))  # of timesteps 0 to 999
SIGMAS = np.sqrt(1 - ALPHAS**2)
LEVELS = (ALPHAS.astype(np.float32), SIGMAS.astype(np.float32))


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


def context(x0=None, prediction_type="epsilon", base_pair=base_pair, batch=B, floor=0.0):
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
        base,
        grid.noise_levels(config),
        floor,
        lambda latents, timesteps: base(0.9 * latents, timesteps),
    )


def clean(output, latents, alpha, sigma, prediction_type):
    if prediction_type == "epsilon":
        return (latents - sigma * output) / alpha
    return alpha * latents - sigma * output


def options(**fields):
    default = {
        "weight": 1.0,
        "form": "pull",
        "guided": False,
        "scale": 3.5,
        "least": 0.02,
        "most": 0.98,
        "skip": 0.1,
        "c": 1e-3,
    }
    return ConfigDict(default | fields)


def test_every_regularizer_of_the_config_is_known():
    known = {*regularizers.DIRECTIONS, *regularizers.ELSEWHERE}
    assert known == set(get_config().regularizers)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_output_pulls_to_the_bases_x0_at_the_same_input(prediction_type, guided):
    at = context().trajectory
    prompted, empty = (
        clean(output, at.latents, ALPHAS[499], SIGMAS[499], prediction_type)
        for output in base_pair(at.latents, at.timesteps)
    )
    target = empty + 3.5 * (prompted - empty) if guided else prompted
    expected = (target - at.x0) / np.sqrt(np.prod(SHAPE))
    found = directions.output(context(prediction_type=prediction_type), options(guided=guided))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def renoised(x0, least, most, tag, keys):
    """By method.md: one level a sample, alpha x0 + sigma noise."""
    share = least + (most - least) * np.asarray(rollout.uniform(keys, tag))
    timesteps = 999 - np.clip(np.floor((1 - share) * 1000), 0, 999).astype(int)
    alpha, sigma = (x[timesteps][:, None, None, None] for x in (ALPHAS, SIGMAS))
    noise = np.asarray(rollout.normal(keys, tag + 1, SHAPE))
    latents = (alpha * np.asarray(x0) + sigma * noise).astype(np.float32)
    return jnp.asarray(latents), jnp.asarray(timesteps.astype(np.float32)), alpha, sigma


def test_feature_descends_the_relative_distance_of_both_renoised_outputs():
    made = context()

    def distance(x0):
        total, features = 0.0, []
        for one in (x0, made.base_x0):
            share = 0.1 + 0.5 * rollout.uniform(made.keys, 100)
            timesteps = 999 - jnp.clip(jnp.floor((1 - share) * 1000), 0, 999).astype(int)
            alpha, sigma = (jnp.asarray(x)[timesteps][:, None, None, None] for x in LEVELS)
            latents = alpha * one + sigma * rollout.normal(made.keys, 101, SHAPE)
            features.append(base_features(latents, timesteps.astype(jnp.float32)))
        for ours, theirs in zip(*features, strict=True):
            total += jnp.mean((ours - theirs) ** 2) / (jnp.mean(theirs**2) + 1e-6)
        return total

    expected = -np.sqrt(np.prod(SHAPE)) / 2 * jax.grad(distance)(made.x0)
    found = directions.feature(made, options(least=0.1, most=0.6))
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    # The generator's own output is compared with the base's: equal ones are not pulled.
    assert not np.any(directions.feature(context(made.base_x0), options()))


def predictions(made, prediction_type="epsilon"):
    """What the base makes of the re-noised output, with and without the prompt."""
    latents, timesteps, alpha, sigma = renoised(made.x0, 0.02, 0.98, 200, made.keys)
    return (
        np.asarray(clean(output, latents, alpha, sigma, prediction_type))
        for output in base_pair(latents, timesteps)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("form", directions.GUIDANCE_FORMS)
def test_guidance_is_the_formula(form, prediction_type):
    made = context(prediction_type=prediction_type)
    prompted, empty = predictions(made, prediction_type)
    along, guided = prompted - empty, empty + 3.5 * (prompted - empty)
    x0, root = np.asarray(made.x0), np.sqrt(np.prod(SHAPE))
    size = np.abs(x0 - guided).mean((1, 2, 3), keepdims=True)
    expected = {
        "pull": (guided - x0) / root,
        "tdm": 2.5 * along / (root * size),
        "direction": along / np.sqrt((along**2).sum((1, 2, 3), keepdims=True)),
    }[form]
    found = directions.guidance(made, options(form=form))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["pull", "tdm"])
def test_the_scale_of_guidance_changes_the_pull(form):
    """It must not cancel, neither from the direction nor from its size."""
    small, large = (directions.guidance(context(), options(form=form, scale=s)) for s in (2, 7))
    sizes = np.asarray(directions.norm(large) / directions.norm(small))
    assert (sizes > 1.1).all() or (form == "tdm" and (np.abs(sizes - 1) > 0.02).all())


def test_guidance_of_a_base_that_ignores_the_prompt_is_nothing():
    deaf = context(base_pair=lambda latents, timesteps: (base(latents, timesteps),) * 2)
    assert not np.any(directions.guidance(deaf, options(form="tdm")))
    assert not np.any(directions.guidance(deaf, options(form="direction")))


def test_levels_are_not_below_the_floor():
    made = context(batch=8, floor=0.5)
    many = dataclasses.replace(made, keys=sample_keys(500))
    x0 = jnp.zeros((500, 1, 1, 2))
    timesteps = np.asarray(many.renoise(x0, (0.2, 0.7), 100).timesteps)
    assert 499 <= timesteps.min() < 505 and 690 < timesteps.max() <= 700
    timesteps = np.asarray(many.renoise(x0, (0.1, 0.3), 100).timesteps)
    assert timesteps.min() == timesteps.max() == 499


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


def test_a_direction_depends_on_its_own_sample_alone():
    """So that microbatches average to the large batch, whatever a sample's neighbours are."""
    for name, direction in regularizers.DIRECTIONS.items():
        whole = direction(context(batch=4), options())
        for rows in (slice(0, 2), slice(2, 4)):
            made = context(batch=4)
            at = made.trajectory
            part = at._replace(
                latents=at.latents[rows], timesteps=at.timesteps[rows], x0=at.x0[rows]
            )
            half = dataclasses.replace(made, trajectory=part, keys=made.keys[rows])
            np.testing.assert_allclose(
                direction(half, options()), whole[rows], rtol=1e-4, atol=1e-6, err_msg=name
            )
