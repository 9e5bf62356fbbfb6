"""What a page draws is what `r0_jax.sample` draws, and programs are compiled once."""

import jax
import numpy as np
import pytest

from r0_jax import sample
from r0_jax.demo import models
from r0_jax.demo.studio import Studio
from r0_jax.rewards.reward import Reward
from r0_jax.workdir.workdir import LocalWorkdir

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def studio(world):
    def score(params, images, features):
        return images.mean((1, 2, 3)) + 0 * features[:, 0]

    def features(params, prompts):
        return np.asarray([[len(prompt)] for prompt in prompts], np.float32)

    bright = Reward("bright", {}, score, features)
    found = models.load([f"base={world / 'base'}", f"R0={world / 'run'}"])
    return Studio(found, [bright])


def test_images_are_those_of_sample(world, studio):
    drawn = studio.draw(1, PROMPT, 3, 4, 1.0)
    source = sample.from_run(LocalWorkdir(world / "run"))
    [expected] = next(sample.draw(source, [PROMPT], seed=3))
    np.testing.assert_allclose(drawn.image, expected, atol=2e-5)
    assert drawn.network_calls == 4 and drawn.compiled and drawn.seconds > 0
    assert drawn.scores == {"bright": pytest.approx(float(expected.mean()), abs=1e-5)}

    guided = studio.draw(0, PROMPT, 3, 5, 2.5)
    source = sample.from_pipeline(world / "base", 5)
    [expected] = next(sample.draw(source, [PROMPT], seed=3, guidance_scale=2.5))
    np.testing.assert_allclose(guided.image, expected, atol=2e-5)
    assert guided.network_calls == 2 * len(source.scheduler.timesteps)


def test_another_guidance_needs_no_other_program(studio):
    first = studio.draw(0, PROMPT, 0, 3, 2.0)
    other = studio.draw(0, PROMPT, 0, 3, 4.0)
    assert first.compiled and not other.compiled
    assert np.abs(first.image - other.image).max() > 1e-3
    assert studio.draw(0, PROMPT, 0, 3, 1.0).compiled  # without guidance is another one


def test_models_of_one_folder_share_what_is_not_trained(studio):
    base, run = studio._params
    assert base["vae"] is run["vae"] and base["unet"] is not run["unet"]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(run["unet"]))
