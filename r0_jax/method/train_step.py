"""One pure training step: gradients over all microbatches, then the optimizer, then the EMA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from r0_jax.method import optim, reward_spread, stacks
from r0_jax.method.objective import SQUARE, Metrics, Objective
from r0_jax.method.train_state import TrainState

TrainStep = Callable[
    [TrainState, dict[str, Any], dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]
]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    count: int,
    over_devices: NamedSharding,
) -> TrainStep:
    """Return a pure step (state, frozen, batch, key) -> (state, metrics), to jit with shardings.

    `batch` is the global one. The step cuts it into `count` microbatches [count, samples, ...],
    places them as `over_devices` says, and averages their gradients. Every random draw belongs to
    a sample, so that this equals one large batch.
    """

    def train_step(
        state: TrainState, frozen: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        state = stacks.pack(state, stacks.groups(state.params))
        key = jax.random.fold_in(key, state.step)
        step_key, sample_key = jax.random.split(key)
        last = objective.draw_last(step_key)
        spreads = reward_spread.std(state.moments)
        size = len(next(iter(batch.values())))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(sample_key, jnp.arange(size))

        def microbatch(batch, keys):
            (loss, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(
                state.params, frozen, batch, keys, last, spreads
            )
            return loss, metrics, grads

        def cut(x):
            # Interleaved: each microbatch takes an equal share of every device's samples.
            x = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
            return lax.with_sharding_constraint(x, over_devices)

        if count == 1:
            loss, metrics, grads = microbatch(batch, keys)
        else:

            def add(total, part):
                return jax.tree.map(lambda t, x: t + x / count, total, microbatch(*part)), None

            parts = jax.tree.map(cut, (batch, keys))
            shapes = jax.eval_shape(lambda: microbatch(*jax.tree.map(lambda x: x[0], parts)))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (loss, metrics, grads), _ = lax.scan(add, zeros, parts)

        return _update(state, grads, loss, metrics, optimizer, config)

    return train_step


def _update(
    state: TrainState,
    grads,
    loss,
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
) -> tuple[TrainState, Metrics]:
    norm = optim.global_norm(grads)
    squares = {name: metrics.pop(SQUARE + name) for name in state.moments}
    means = {name: metrics[f"reward/{name}"] for name in state.moments}
    moments = reward_spread.update(state.moments, means, squares)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optim.update_ema(state.ema_params, params, config.ema_decay)
    new = TrainState(
        state.step + 1,
        params,
        ema_params,
        opt_state,
        state.skipped,
        state.skipped_in_a_row,
        moments,
    )
    new = optim.skip_if_nonfinite(state, new, norm)
    return stacks.unpack(new), {
        "train/loss": loss,
        **metrics,
        "norm/grads": norm,
        "norm/params": optim.global_norm(new.params),
        "train/skipped": new.skipped,
        "train/skipped_in_a_row": new.skipped_in_a_row,
        **{f"reward_std/{name}": x for name, x in reward_spread.std(new.moments).items()},
        # The optimizer does not count skipped steps.
        "train/learning_rate": optim.learning_rate_schedule(config)(state.step - state.skipped),
    }
