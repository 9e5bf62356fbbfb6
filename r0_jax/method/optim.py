"""From gradients to parameters: clipped AdamW, Langevin noise, EMA, and skipped steps."""

import difflib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped
from ml_collections import ConfigDict

from r0_jax.errors import InputError
from r0_jax.method.train_state import TrainState

SCHEDULES = ("constant", "cosine")

Params = dict[str, Shaped[Array, "..."]]


def make_optimizer(
    config: ConfigDict, temperature: float = 0.0, updates: int = 1
) -> optax.GradientTransformation:
    """Return global-norm clipping, AdamW, and Langevin noise if `temperature` is not 0.

    It reads config.optimizer, config.steps and config.seed. A step of the training makes `updates`
    of them, all at one learning rate. Weight decay acts on matrices only, never on biases and
    norms. Raises InputError for numbers out of range.
    """
    c = config.optimizer
    if not c.eps > 0:  # Adam would divide 0 by 0 where a gradient is 0
        raise InputError(f"optimizer.eps={c.eps} must be positive")
    for field in ("learning_rate", "weight_decay", "eps"):
        if not (math.isfinite(c[field]) and c[field] >= 0):
            raise InputError(f"optimizer.{field}={c[field]} must be a number that is not negative")
    for field in ("b1", "b2"):
        if not 0 <= c[field] < 1:
            raise InputError(f"optimizer.{field}={c[field]} must be at least 0 and below 1")
    if not c.clip_norm > 0:
        raise InputError(f"optimizer.clip_norm={c.clip_norm} must be positive (inf: no clipping)")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature} must be a number that is not negative")
    of_step = learning_rate_schedule(config)
    schedule = of_step if updates == 1 else lambda count: of_step(count // updates)
    chain = [
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(schedule, c.b1, c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=_is_matrix),
    ]
    if temperature:
        chain.append(langevin(temperature, schedule, config.seed))
    return optax.chain(*chain)


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the schedule: number of updates done -> learning rate, float32.

    It rises in a line to config.optimizer.learning_rate within `warmup_steps`, and is not 0 at
    the first update. Then it is constant, or falls as half a cosine to 0 at config.steps.
    """
    c = config.optimizer
    if c.schedule not in SCHEDULES:
        hint = difflib.get_close_matches(c.schedule, SCHEDULES, n=1) or [" or ".join(SCHEDULES)]
        raise InputError(f"optimizer.schedule={c.schedule!r} is unknown; use {hint[0]}")
    if c.warmup_steps < 0:  # more than `steps` is fine: a short trial run ends while warming up
        raise InputError(f"optimizer.warmup_steps={c.warmup_steps} must not be negative")
    decay_steps = max(config.steps - c.warmup_steps, 1)

    def schedule(count: Int[ArrayLike, ""]) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        rate = c.learning_rate * jnp.minimum((count + 1.0) / max(c.warmup_steps, 1), 1.0)
        if c.schedule == "cosine":
            progress = jnp.clip((count - c.warmup_steps) / decay_steps, 0.0, 1.0)
            rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return rate

    return schedule


def _is_matrix(params: Params) -> dict[str, bool]:
    # A stacked parameter ("blocks.*.bias") has one axis more than each of its members.
    return {name: x.ndim - name.count("*") >= 2 for name, x in params.items()}


class LangevinState(NamedTuple):
    """Count the updates that got noise."""

    count: Int[Array, ""]


def langevin(
    temperature: float, learning_rate: optax.Schedule, seed: int
) -> optax.GradientTransformation:
    """Add sqrt(2 * lr * T) * N(0, 1) to each update, as the last of a chain.

    Plain SGLD would sample a posterior with it. After a clipped, preconditioned optimizer and
    normalized rewards it is parameter noise, no more. The noise depends only on seed, count and the
    parameter's place among the sorted names. So neither sharding nor a resume changes it, and the
    state holds no key.
    """

    def init(params: Params) -> LangevinState:
        del params
        return LangevinState(jnp.zeros((), jnp.int32))

    def update(updates: Params, state: LangevinState, params: Any = None):
        del params
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        scale = jnp.sqrt(2.0 * temperature * learning_rate(state.count))
        noisy = {}
        for index, name in enumerate(sorted(updates)):
            x = updates[name]
            noise = jax.random.normal(jax.random.fold_in(key, index), x.shape, jnp.float32)
            noisy[name] = x + (scale * noise).astype(x.dtype)
        return noisy, LangevinState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def update_ema(ema_params: Params, params: Params, decay: Float[ArrayLike, ""]) -> Params:
    """Return decay * ema_params + (1 - decay) * params."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema_params, params)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Return the Euclidean norm of all leaves together, in float32 whatever their dtype."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def skip_if_nonfinite(
    old_state: TrainState, new_state: TrainState, grads_norm: Float[Array, ""]
) -> TrainState:
    """Return `new_state` if the gradient norm, its parameters and its fake score are finite.

    Otherwise return `old_state`, whose parameters, EMA and optimizer stay as they are, with this
    skipped step counted. `step` advances in both cases, so that the next step sees other data.
    """
    trained = global_norm((new_state.params, new_state.fake))
    finite: Bool[Array, ""] = jnp.isfinite(grads_norm) & jnp.isfinite(trained)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, old_state)
    return kept._replace(
        step=new_state.step,
        skipped=old_state.skipped + jnp.where(finite, 0, 1),
        skipped_in_a_row=jnp.where(finite, 0, old_state.skipped_in_a_row + 1),
    )
