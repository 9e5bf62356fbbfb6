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
from r0_jax.method.generator import Generator
from r0_jax.method.objective import SQUARE, Metrics, Objective
from r0_jax.method.reward_step import Drawn
from r0_jax.method.train_state import FakeState, TrainState

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
        state = _packed(state)
        keys, drawn, spreads = _draws(objective, state, batch, key)
        read = frozen | objective.read(state)

        def graded(batch, keys):
            def loss(params, fake):
                return objective.loss(params, read | fake, batch, keys, drawn, spreads)

            fake = {"fake": state.fake.params} if objective.fake else {}
            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state.params, fake)

        (loss, metrics), (grads, of_fake) = _mean(graded, (batch, keys), count, over_devices)

        def train_fake(params):
            """Return the fake score after this step, in which the generator becomes `params`."""
            fake = objective.fake.update(state.fake, of_fake["fake"])
            if objective.fake.updates == 1:
                return fake

            def again(fake, i):
                keys, drawn, _ = _draws(objective, state, batch, jax.random.fold_in(key, i))

                def grads(batch, keys):
                    return jax.grad(objective.fake_loss)(
                        fake.params, params, frozen, batch, keys, drawn
                    )

                means = _mean(grads, (batch, keys), count, over_devices)
                return objective.fake.update(fake, means), None

            return lax.scan(again, fake, jnp.arange(1, objective.fake.updates))[0]

        if objective.fake:
            metrics["norm/fake_grads"] = optim.global_norm(of_fake)
        return _update(
            state,
            grads,
            loss,
            metrics,
            optimizer,
            config,
            objective.generator,
            frozen,
            train_fake if objective.fake else None,
        )

    return train_step


def make_term_norms(
    objective: Objective, count: int, over_devices: NamedSharding
) -> Callable[[TrainState, dict[str, Any], dict[str, jax.Array], jax.Array], Metrics]:
    """Return a function of the train step's arguments: "norm/params/TERM" of its first microbatch.

    It draws what the train step draws.
    """

    def term_norms(
        state: TrainState, frozen: dict[str, Any], batch: dict[str, jax.Array], key: jax.Array
    ) -> Metrics:
        state = _packed(state)
        keys, drawn, spreads = _draws(objective, state, batch, key)
        if count > 1:
            parts = _cut((batch, keys), count, over_devices)
            batch, keys = jax.tree.map(lambda x: x[0], parts)
        read = frozen | objective.read(state)
        return objective.term_norms(state.params, read, batch, keys, drawn, spreads)

    return term_norms


def _draws(
    objective: Objective, state: TrainState, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, Drawn, dict[str, jax.Array]]:
    """Return the samples' keys, what is rewarded and the spread of each reward."""
    step_key, sample_key = jax.random.split(jax.random.fold_in(key, state.step))
    size = len(next(iter(batch.values())))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(sample_key, jnp.arange(size))
    return keys, objective.draw(step_key), reward_spread.std(state.moments)


def _packed(state: TrainState) -> TrainState:
    """Stack the arrays of a transformer's blocks, of the generator and of the fake score."""
    if state.fake:
        groups = stacks.groups(state.fake.params)
        state = state._replace(fake=stacks.pack(state.fake, groups))
    return stacks.pack(state, stacks.groups(state.params))


def _mean(function: Callable, arguments: Any, count: int, over_devices: NamedSharding) -> Any:
    """Return the mean of what a function returns of `count` microbatches of its arguments."""
    if count == 1:
        return function(*arguments)

    def add(total, part):
        return jax.tree.map(lambda t, x: t + x / count, total, function(*part)), None

    parts = _cut(arguments, count, over_devices)
    shapes = jax.eval_shape(lambda: function(*jax.tree.map(lambda x: x[0], parts)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(add, zeros, parts)[0]


def _cut(tree: Any, count: int, over_devices: NamedSharding) -> Any:
    """Cut arrays into microbatches [count, samples, ...].

    Interleaved: each microbatch takes an equal share of every device's samples.
    """

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
        return lax.with_sharding_constraint(x, over_devices)

    return jax.tree.map(cut, tree)


def _update(
    state: TrainState,
    grads,
    loss,
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    generator: Generator,
    frozen: dict[str, Any],
    train_fake: Callable[[dict[str, jax.Array]], FakeState] | None,
) -> tuple[TrainState, Metrics]:
    # The optimizer does not count the steps that were skipped.
    rate = optim.learning_rate_schedule(config)(state.step - state.skipped)
    start = state.params
    if pull := config.regularizers.weight.weight:  # decoupled from Adam, as AdamW's decay
        start = generator.toward_base(start, frozen["base"], rate * pull)
        distance = generator.squared_distance(state.params, frozen["base"])
        taken = jax.tree.map(jnp.subtract, state.params, start)
        metrics = metrics | {
            "norm/from_pretrained": jnp.sqrt(distance),
            "norm/weight_pull": optim.global_norm(taken),
        }
    norm = optim.global_norm(grads)
    squares = {name: metrics.pop(SQUARE + name) for name in state.moments}
    means = {name: metrics[f"reward/{name}"] for name in state.moments}
    moments = reward_spread.update(state.moments, means, squares)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(start, updates)
    ema_params = optim.update_ema(state.ema_params, params, config.ema_decay)
    new = TrainState(
        state.step + 1,
        params,
        ema_params,
        opt_state,
        state.skipped,
        state.skipped_in_a_row,
        moments,
        train_fake(params) if train_fake else (),
    )
    new = optim.skip_if_nonfinite(state, new, norm)
    return stacks.unpack(new), {
        "train/loss": loss,
        **metrics,
        "norm/grads": norm,
        "norm/updates": optim.global_norm(updates),
        "norm/params": optim.global_norm(new.params),
        "train/skipped": new.skipped,
        "train/skipped_in_a_row": new.skipped_in_a_row,
        **{f"reward_std/{name}": x for name, x in reward_spread.std(new.moments).items()},
        "train/learning_rate": rate,
    }
