"""How much each reward's scores vary from sample to sample, as a running average over the steps.

What objective.normalization = "running_std" divides a reward's gradients by: one number a reward,
so that samples keep their share, and a gradient that vanishes (a sample that is as good as the
reward can tell) stays small.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of each reward: averages of 1, of its score and of the score's square; the first undoes the bias
# of averages that start at 0, as in Adam.
Moments = dict[str, Float[Array, "3"]]

DECAY = 0.95


def init(names: Sequence[str]) -> Moments:
    """Nothing seen yet."""
    return {name: jnp.zeros(3) for name in names}


def update(
    moments: Moments, means: dict[str, Float[Array, ""]], squares: dict[str, Float[Array, ""]]
) -> Moments:
    """After a step, of whose scores `means` are the means and `squares` those of the squares."""
    return {
        name: DECAY * old + (1 - DECAY) * jnp.stack([jnp.ones(()), means[name], squares[name]])
        for name, old in moments.items()
    }


def std(moments: Moments) -> dict[str, Float[Array, ""]]:
    """The standard deviation of each reward's scores; 1 before the first step."""

    def one(moment: jax.Array) -> jax.Array:
        seen = moment[0]
        mean, square = moment[1:] / jnp.maximum(seen, 1 - DECAY)  # its least after a step
        return jnp.where(seen > 0, jnp.sqrt(jnp.maximum(square - mean**2, 0.0)), 1.0)

    return {name: one(moment) for name, moment in moments.items()}
