"""Which prediction is rewarded, and which steps carry a gradient."""

import collections

import jax
import numpy as np
import pytest

from r0_jax import config as base
from r0_jax.method import reward_step


def drawn(method, count=400, **objective):
    config = base.get_config()
    config.sampler.num_steps = 12
    config.objective.method = method
    config.objective.update(objective)
    draw = jax.jit(jax.vmap(lambda key: reward_step.draw(config, key)))
    return config, draw(jax.random.split(jax.random.key(0), count))


def test_r0_rewards_the_last_step():
    config = base.get_config()
    assert reward_step.draw(config, jax.random.key(0)) == reward_step.Drawn(3)
    assert not reward_step.is_random(config)


@pytest.mark.parametrize(
    ("method", "late", "steps"), [("r0plus", 10, range(12)), ("refl", 5, range(7, 12))]
)
def test_every_allowed_step_is_rewarded_as_often(method, late, steps):
    config, found = drawn(method, late_steps=late)
    assert found.graded is None and reward_step.is_random(config)
    counts = collections.Counter(np.asarray(found.last).tolist())
    assert sorted(counts) == list(steps)
    assert min(counts.values()) > 0.5 * 400 / len(steps)
    assert reward_step.mean_before(config) == np.mean(steps)


def test_drtune_spaces_its_steps_evenly_up_to_the_rewarded_one():
    _, found = drawn("drtune", late_steps=5, grad_steps=3)
    assert set(np.asarray(found.last).tolist()) == set(range(7, 12))
    starts = collections.defaultdict(set)
    for last, graded in zip(np.asarray(found.last), np.asarray(found.graded), strict=True):
        assert set(np.diff(graded)) == {(last + 1) // 3}
        assert graded[0] >= 0 and graded[-1] <= last
        starts[int(last)].add(int(graded[0]))
    assert starts[11] == {0, 1, 2, 3} and starts[7] == {0, 1, 2, 3}
