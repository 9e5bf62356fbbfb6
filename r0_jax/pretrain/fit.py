"""The supervised training loop of all pretraining stages."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from rich.console import Console

from r0_jax.errors import InputError
from r0_jax.weights.network import Params

console = Console(stderr=True)


def fit(
    loss: Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: Params,
    batches: Iterator[Any],
    config: ConfigDict,
    on_evaluate: Callable[[int, Params], None] | None = None,
) -> Params:
    """Train with AdamW, warm-up and cosine decay; return the moving average of the parameters.

    Raise InputError if `config.steps` does not exceed `config.warmup_steps`.

    Args:
      loss: (params, batch, key) -> (scalar, metrics).
      on_evaluate: called with (step, averaged params) every `config.eval_every` steps.
    """
    if config.steps <= config.warmup_steps:
        raise InputError(
            f"steps={config.steps} must be more than warmup_steps={config.warmup_steps}"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.02 * config.learning_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay),
    )

    @jax.jit
    def update(params, average, opt_state, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        # A low decay at first lets the average forget the random start.
        decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, average, opt_state, {"loss": value, **metrics}

    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    average, opt_state = params, optimizer.init(params)
    start = time.monotonic()
    metrics = {}
    for step, batch in zip(range(config.steps), batches, strict=False):
        batch = jax.device_put(batch, by_sample)
        ahead = update(params, average, opt_state, batch, step)
        # Wait for each step. With many fake devices on few cores, hundreds of queued sums would
        # deadlock.
        jax.block_until_ready(metrics)
        params, average, opt_state, metrics = ahead
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            seconds = time.monotonic() - start
            left = seconds / (step + 1) * (config.steps - step - 1)
            line = " ".join(f"{k} {float(v):.4f}" for k, v in metrics.items())
            console.print(
                f"step {step + 1}/{config.steps} {line}  {seconds:.0f} s, {left:.0f} s left",
                highlight=False,
            )
        if on_evaluate and (step + 1) % config.eval_every == 0:
            on_evaluate(step + 1, average)
    return jax.device_get(average)
