"""The spread of each reward's scores from sample to sample, a running average over the steps.

objective.normalization = "running_std" divides a reward's gradients by it. It is one number a
reward. So samples keep their share, and a gradient that vanishes stays small: that sample is as
good as the reward can tell.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of each reward, the averages of 1, of its score and of the score's square. The first one undoes
# the bias of averages that start at 0, as in Adam.
Moments = dict[str, Float[Array, "3"]]

DECAY = 0.95


def init(names: Sequence[str]) -> Moments:
    """Return the moments before the first step, zeros."""
    return {name: jnp.zeros(3) for name in names}


def update(
    moments: Moments, means: dict[str, Float[Array, ""]], squares: dict[str, Float[Array, ""]]
) -> Moments:
    """Return the moments after a step.

    `means` are the means of its scores, `squares` those of their squares, by reward.
    """
    return {
        name: DECAY * old + (1 - DECAY) * jnp.stack([jnp.ones(()), means[name], squares[name]])
        for name, old in moments.items()
    }


def std(moments: Moments) -> dict[str, Float[Array, ""]]:
    """Return the standard deviation of each reward's scores; 1 before the first step."""

    def one(moment: jax.Array) -> jax.Array:
        seen = moment[0]
        mean, square = moment[1:] / jnp.maximum(seen, 1 - DECAY)  # its least after a step
        return jnp.where(seen > 0, jnp.sqrt(jnp.maximum(square - mean**2, 0.0)), 1.0)

    return {name: one(moment) for name, moment in moments.items()}
