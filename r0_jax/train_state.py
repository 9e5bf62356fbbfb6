"""What one training step reads and returns; all of it is in a checkpoint."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    counter = jnp.zeros((), jnp.int32)
    state = TrainState(counter, params, params, optimizer.init(params), counter, counter)
    return jax.tree.map(jnp.copy, state)  # a donated state must not hold one buffer twice
