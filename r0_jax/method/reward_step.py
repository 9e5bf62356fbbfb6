"""Which prediction of a rollout is rewarded, and which calls carry the gradient.

    r0       the last image; the last grad_steps calls (1 to all: DRaFT-K)
    r0plus   the prediction of a random call; that call
    refl     the prediction of a random one of the last late_steps calls; that call
    drtune   the prediction of such a call; the outputs of grad_steps calls, evenly spaced up to it

All samples of a batch share what is drawn, so that only the calls up to the rewarded one run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

METHODS = ("r0", "r0plus", "refl", "drtune")


class Drawn(NamedTuple):
    """What is drawn for one training step.

    Attributes:
      last: the step whose prediction is rewarded.
      graded: of "drtune": the steps whose outputs carry a gradient, [grad_steps].
    """

    last: jax.Array | int
    graded: Int[Array, " n"] | None = None


def draw(config: ConfigDict, key: jax.Array) -> Drawn:
    """Return what a training step rewards."""
    method, steps = config.objective.method, config.sampler.num_steps
    if method == "r0":
        return Drawn(steps - 1)
    least = 0 if method == "r0plus" else steps - config.objective.late_steps
    if method != "drtune":
        return Drawn(jax.random.randint(key, (), least, steps))
    last_key, start_key = jax.random.split(key)
    last = jax.random.randint(last_key, (), least, steps)
    count = config.objective.grad_steps
    stride = (last + 1) // count
    start = jax.random.randint(start_key, (), 0, last + 1 - (count - 1) * stride)
    return Drawn(last, start + stride * jnp.arange(count))


def is_random(config: ConfigDict) -> bool:
    """Return whether the rewarded step is drawn."""
    return config.objective.method != "r0"


def mean_before(config: ConfigDict) -> float:
    """Return how many calls come before the rewarded one on average, where it is drawn."""
    steps, method = config.sampler.num_steps, config.objective.method
    choices = steps if method == "r0plus" else config.objective.late_steps
    return steps - (choices + 1) / 2
