"""What one training step reads and returns; all of it is in a checkpoint."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from r0_jax.method import reward_spread
from r0_jax.method.reward_spread import Moments

Params = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that changes from step to step.

    Attributes:
      step: int32, steps done; skipped ones count. It is also the position in the data.
      params: the trainable parameters (LoRA factors or full weights) by dotted name, float32.
      ema_params: their exponential moving average.
      opt_state: of the optax optimizer.
      skipped: int32, steps whose gradients were not finite.
      skipped_in_a_row: int32, how many of them were the last ones.
      moments: of the rewards whose gradients are divided by their running spread.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    moments: Moments


def init(
    params: Params, optimizer: optax.GradientTransformation, spread_of: Sequence[str] = ()
) -> TrainState:
    """The state before the first step; `spread_of` names rewards whose spread is needed."""
    counter = jnp.zeros((), jnp.int32)
    state = TrainState(
        counter,
        params,
        params,
        optimizer.init(params),
        counter,
        counter,
        reward_spread.init(spread_of),
    )
    return jax.tree.map(jnp.copy, state)  # a donated state must not hold one buffer twice
