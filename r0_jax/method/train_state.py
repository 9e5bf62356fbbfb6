"""The state that a training step reads and returns; a checkpoint holds all of it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from r0_jax.method import reward_spread
from r0_jax.method.reward_spread import Moments

Params = dict[str, jax.Array]


class FakeState(NamedTuple):
    """Hold the fake score's adapters and its optimizer's state."""

    params: Params
    opt_state: optax.OptState


class TrainState(NamedTuple):
    """Hold everything that changes from step to step.

    Attributes:
      step: int32, steps done, also the skipped ones. It is also the position in the data.
      params: the trainable parameters (LoRA factors or full weights) by dotted name, float32.
      ema_params: their exponential moving average.
      opt_state: of the optax optimizer.
      skipped: int32, steps whose gradients were not finite.
      skipped_in_a_row: int32, how many of them were the last ones.
      moments: of rewards whose gradients are divided by their running spread (reward_spread.py).
      fake: of the fake score; () where there is none.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    moments: Moments
    fake: FakeState | tuple[()] = ()


def init(
    params: Params,
    optimizer: optax.GradientTransformation,
    spread_of: Sequence[str] = (),
    fake: FakeState | tuple[()] = (),
) -> TrainState:
    """Return the state before the first step; `spread_of` names rewards that need a spread."""
    counter = jnp.zeros((), jnp.int32)
    state = TrainState(
        counter,
        params,
        params,
        optimizer.init(params),
        counter,
        counter,
        reward_spread.init(spread_of),
        fake,
    )
    return jax.tree.map(jnp.copy, state)  # a donated state must not hold one buffer twice
