"""The loop: config -> mesh -> data -> shapes -> shardings -> load or restore -> steps.

Sections stand in the order in which things happen.
"""

import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from r0_jax import (
    checkpoint,
    optim,
    prompt_dataset,
    report,
    rewards,
    sharding,
    testbed,
    train_state,
    workdir,
)
from r0_jax.errors import InputError
from r0_jax.generator import Generator
from r0_jax.metrics import MetricWriter, Throughput
from r0_jax.network import Params
from r0_jax.objective import Objective
from r0_jax.pipelines import stable_diffusion
from r0_jax.progress import TrainingProgress
from r0_jax.rewards import plugin
from r0_jax.rewards.reward import Reward
from r0_jax.train_state import TrainState
from r0_jax.train_step import make_train_step
from r0_jax.validation import Validation

console = Console(stderr=True)


def train_and_evaluate(config: ConfigDict, folder: Path) -> None:
    """Trains to `config.steps`, continuing from the newest checkpoint in `folder` if there is one;
    then makes the table and the report. A SIGTERM saves and returns."""
    check_config(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.check_batch(config.batch_size, mesh, config.accumulation)

    # Pretrained models, on the host.
    pipeline = stable_diffusion.load(config.pretrained, config.dtype)
    trained_on = load_rewards(config.rewards, pipeline, config)
    heldout = load_rewards(config.heldout_rewards, pipeline, config)
    generator = Generator(config.lora.rank, config.lora.alpha, config.lora.targets, config.dtype)
    objective = Objective(pipeline, generator, trained_on, config)

    # The run's folder belongs to this config, and its prompts are prepared once.
    config_digest = workdir.check_same_run(folder, config)
    started = bool(checkpoint.steps(folder))
    if not started:
        shutil.rmtree(folder / "prompts", ignore_errors=True)  # of another config
    summary = prompt_dataset.prepare(config.data.prompts, folder / "prompts", pipeline, trained_on)
    console.print(f"{summary.examples} prompts, {summary.distinct_prompts} of them distinct; "
                  f"{config.steps} steps of {config.batch_size}", highlight=False)

    # Shapes, then shardings: optimizer state and EMA follow their parameter.
    optimizer = optim.make_optimizer(config, config.regularizers.langevin.weight)
    base_part = pipeline.generator_part
    shapes = pipeline.networks[base_part].shapes

    def init(base: Params) -> TrainState:
        params = generator.init(jax.random.key(config.seed), base, shapes)
        return train_state.init(params, optimizer)

    frozen = place_frozen(pipeline, trained_on, mesh, config)
    abstract = jax.eval_shape(init, frozen["base"])
    state_sharding = sharding.state_sharding(abstract, mesh, config.sharding)

    checkpoints = checkpoint.Checkpoints(folder, config.keep_checkpoints,
                                         config.best_metric or None, "max", config_digest)
    with checkpoints:
        # 1. A checkpoint in the run's folder: continue from the newest whole one.
        # 2. None: start from the pretrained weights.
        if started:
            target = sharding.with_sharding(abstract, state_sharding)
            state, _ = checkpoints.restore(target)
        else:
            state = jax.jit(init, out_shardings=state_sharding)(frozen["base"])
        step_fn = jax.jit(make_train_step(objective, optimizer, config, mesh),
                          out_shardings=(state_sharding, sharding.replicated(mesh)),
                          donate_argnums=0)
        validation = Validation(config, folder, pipeline, generator, trained_on + heldout, frozen,
                                {r.name for r in heldout})
        finished = loop(config, folder, mesh, state, started, step_fn, frozen, validation,
                        checkpoints)

    if finished and config.test.prompts and jax.process_index() == 0:
        table = testbed.evaluate_run(folder, config)
        report.print_table(table)
    if finished and jax.process_index() == 0:
        print(f"report: {report.write_report(folder)}")


def enable_compilation_cache(config: ConfigDict) -> None:
    """Compiled programs are kept on disk: a run that continues starts in seconds."""
    cache = config.compilation_cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"),
                                             "r0_jax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))


def check_config(config: ConfigDict) -> None:
    """InputError for values that no later check would name."""
    if config.objective.method not in ("r0", "r0plus"):
        raise InputError(f"objective.method={config.objective.method!r} is unknown; "
                         "use 'r0' or 'r0plus'")
    if config.objective.normalization not in ("per_sample", "none"):
        raise InputError(f"objective.normalization={config.objective.normalization!r} is unknown; "
                         "use 'per_sample' or 'none'")
    if not 1 <= config.objective.grad_steps <= config.sampler.num_steps:
        raise InputError(f"objective.grad_steps={config.objective.grad_steps} must be between 1 "
                         f"and sampler.num_steps={config.sampler.num_steps}")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype={config.dtype!r} is not supported; use 'float32' or 'bfloat16'")
    for name in ("steps", "log_every", "checkpoint_every", "eval_every", "keep_checkpoints"):
        if config[name] < 1:
            raise InputError(f"{name}={config[name]} must be at least 1")
    for name, value in (("pretrained", config.pretrained), ("data.prompts", config.data.prompts)):
        if not value:
            raise InputError(f"{name} is not set: give --config.{name}=PATH")
    if not config.rewards:
        raise InputError("rewards is empty: there is nothing to maximize")
    if not any(entry.weight for entry in config.regularizers.values()):
        warnings.warn("all regularizers have weight 0: rewards alone collapse the generator; "
                      "set regularizers.weight.weight", stacklevel=2)


def load_rewards(entries: ConfigDict, pipeline, config: ConfigDict) -> list[Reward]:
    """The rewards of one section of the config, each tried on random images first."""
    loaded = []
    for name, entry in entries.items():
        reward = rewards.load(name, entry, config.dtype)
        plugin.check(reward, pipeline.image_shape)
        loaded.append(reward)
    return loaded


def place_frozen(pipeline, trained_on: list[Reward], mesh: Mesh, config: ConfigDict
                 ) -> dict[str, Any]:
    """What is never trained, on the devices: the objective's `frozen`."""
    def place(params: Params) -> Params:
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
        return jax.device_put(params, sharding.param_sharding(shapes, mesh, config.sharding))

    parts = {part: place(params) for part, params in pipeline.params.items()}
    parts["base"] = parts.pop(pipeline.generator_part)
    empty_ids = jax.device_put(pipeline.tokenize([""]), sharding.replicated(mesh))
    return {**parts, "rewards": {r.name: place(r.params) for r in trained_on},
            "empty_ids": empty_ids}


def loop(config: ConfigDict, folder: Path, mesh: Mesh, state: TrainState, resumed: bool, step_fn,
         frozen, validation: Validation, checkpoints: checkpoint.Checkpoints) -> bool:
    """Runs the remaining steps; False if a SIGTERM ended them early."""
    step = first = int(state.step)
    batches = device_batches(config, folder, mesh, first)
    key = jax.random.key(config.seed)
    timing = Throughput(config.steps, config.batch_size, first)
    stop = StopSignal()
    writer = MetricWriter(folder, config.tensorboard, config.wandb, resume_step=first)
    with writer, stop, TrainingProgress(config.steps, first, console) as progress:

        def evaluate_and_save() -> None:
            with timing.paused():
                values = validation(state.ema_params, step)
                writer.write(step, values)
                checkpoints.save(state, values)

        def log(metrics: dict[str, jax.Array], step: int) -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values |= timing.update(step)
            if step % config.log_every == 0:
                writer.write(step, values)
            progress.update(step, values)
            in_a_row = int(values["train/skipped_in_a_row"])
            if in_a_row >= config.max_skipped_in_a_row:
                raise InputError(
                    f"the gradients of the last {in_a_row} steps (to step {step}) were not finite; "
                    f"the newest checkpoint is step {checkpoints.latest_step()}: lower "
                    "optimizer.learning_rate or optimizer.clip_norm and start from there")

        if not resumed:
            evaluate_and_save()
        pending = None  # metrics of the step before, fetched while this one runs
        while step < config.steps and not stop.requested():
            state, metrics = step_fn(state, frozen, next(batches), key)
            step += 1
            if pending is not None:
                log(pending, step - 1)
            pending = metrics
            evaluates = step % config.eval_every == 0 or step == config.steps
            if evaluates or step % config.checkpoint_every == 0:
                # A step's metrics are on disk before its checkpoint: a kill in between loses none.
                log(pending, step)
                pending = None
            if evaluates:
                evaluate_and_save()
            elif step % config.checkpoint_every == 0:
                checkpoints.save(state)
        if pending is not None:
            log(pending, step)
        if step < config.steps:
            checkpoints.save(state)
            checkpoints.wait()
            console.print(f"stopped at step {step}, which is saved: the same command continues")
    return step == config.steps


def device_batches(config: ConfigDict, folder: Path, mesh: Mesh, step: int
                   ) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, from `step` on."""
    split = sharding.batch_sharding(mesh)
    for batch in prompt_dataset.batches(folder / "prompts", config.batch_size, config.seed, step,
                                        jax.process_index(), jax.process_count()):
        yield sharding.put_batch(batch, split)


class StopSignal:
    """True once SIGTERM came, on all processes at the same step; a context manager."""

    def __init__(self):
        self._came = False

    def __enter__(self) -> "StopSignal":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: object) -> None:
        del number, frame
        self._came = True

    def requested(self) -> bool:
        if jax.process_count() == 1:
            return self._came
        # Preemption may reach one host first: stop together, or collectives wait for ever.
        return bool(np.any(multihost_utils.process_allgather(jnp.asarray(self._came))))
