"""The loop: config -> mesh -> data -> shapes -> shardings -> load or restore -> steps.

Sections stand in the order in which things happen.
"""

import contextlib
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from r0_jax import config_check, remote, rewards
from r0_jax.console import TrainingProgress, console
from r0_jax.diffusion import schedulers
from r0_jax.errors import InputError
from r0_jax.evaluation import report, testbed
from r0_jax.evaluation.validation import Validation
from r0_jax.method.train_state import TrainState
from r0_jax.parallel import distributed, heartbeat, replicas, sharding
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.pipelines import families
from r0_jax.prompts import dataset, prepared
from r0_jax.prompts import encoded as encoded_prompts
from r0_jax.prompts.encoded import EncodedPrompts
from r0_jax.rewards import plugin
from r0_jax.rewards.reward import Reward
from r0_jax.training import host_memory, program
from r0_jax.training.early_stop import EarlyStop
from r0_jax.weights import lazy
from r0_jax.workdir import checkpoint, identity
from r0_jax.workdir.metrics import MetricWriter, Throughput
from r0_jax.workdir.workdir import Workdir


def train_and_evaluate(config: ConfigDict, workdir: Workdir, stop: StopSignal) -> bool:
    """Trains to `config.steps`, continuing from the newest checkpoint in `workdir` if there is one;
    then makes the table and the report. A SIGTERM in training saves and returns False, at any other
    time it raises Stopped."""
    with contextlib.ExitStack() as held:
        if not _train(config, workdir, stop, held):
            return False
        # What training held on the devices is gone by now.
        table = testbed.evaluate_run(workdir, config) if config.test.prompts else None
        if jax.process_index() == 0:
            if table is not None:
                report.print_table(table)
            print(f"report: {report.write_report(workdir.path)}")
        return True


def _train(
    config: ConfigDict, workdir: Workdir, stop: StopSignal, held: contextlib.ExitStack
) -> bool:
    """Whether it came to its end; `held` keeps the folder from other runs."""
    identity.check_same_everywhere(config)
    config_check.check_config(config)
    testbed.check(config.test, config.heldout_rewards)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.microbatches(config.batch_size, config.device_batch, mesh)

    # Pretrained models; their weights stay in the files.
    encoded = encoded_prompts.open_of(config)  # then no text encoder is needed
    pipeline = families.load(config.pretrained, config.dtype, config.family, text=encoded is None)
    heartbeat.beat("the pretrained pipeline's files")
    if encoded is not None:
        pipeline = encoded.attach(pipeline)
        check_encoded(encoded, config)
    if config.test.prompts:  # too many steps for the base would show when the training is over
        schedulers.from_folder(pipeline.scheduler_config, config.test.base_steps)
    trained_on = load_rewards(config.rewards, pipeline, config, encoded, trained=True)
    heldout = load_rewards(config.heldout_rewards, pipeline, config, encoded, trained=False)
    for reward, other in itertools.product(trained_on, heldout):
        names = (config.rewards[reward.name].function, config.heldout_rewards[other.name].function)
        if reward.same_weights(other) or (names[0] and names[0] == names[1]):
            warnings.warn(
                f"the held-out reward {other.name} is {reward.name} again, "
                "which is trained on: it will not show reward hacking",
                stacklevel=2,
            )
    built = program.build(config, mesh, pipeline, trained_on)

    # The run's folder belongs to this config, and its prompts are prepared once.
    started, config_digest = distributed.of_first(lambda: open_folder(config, workdir, held))
    identity.check_shared(workdir)
    if encoded is None:
        examples, distinct, _ = distributed.of_first(
            lambda: prepared.prepare(
                config.data.prompts, workdir.path / "prompts", pipeline, trained_on, heldout
            )
        )
        counted = f"{examples} prompts, {distinct} of them distinct"
        read = functools.partial(prepared.batches, workdir.path / "prompts")
    else:
        counted = f"{encoded.rows[encoded_prompts.TRAIN]} prompts, encoded before"
        read = functools.partial(
            encoded_prompts.batches,
            encoded.folder,
            encoded_prompts.columns_of(pipeline, trained_on),
        )
    workdir.share()
    console.print(f"{counted}; {config.steps} steps of {config.batch_size}", highlight=False)

    frozen = lazy.place(
        built.frozen,
        built.frozen_sharding,
        placed=functools.partial(heartbeat.beat, "a tensor's place on the devices"),
    )
    trained = parameter_overview.count_parameters(built.abstract_state.params)
    console.print(f"{trained:,} trained parameters", highlight=False)

    checkpoints = checkpoint.Checkpoints(
        workdir, config.keep_checkpoints, config.best_metric or None, config_digest
    )
    with checkpoints:
        # 1. A checkpoint in the run's folder: continue from the newest whole one.
        # 2. None: start from the pretrained weights.
        measured = False
        if started:
            state, metadata = checkpoints.restore(built.abstract_state)
            measured = bool(metadata["metrics"])
        else:
            state = jax.jit(built.init, out_shardings=built.state_sharding)(frozen["base"])
        validation = Validation(
            config,
            workdir.path,
            built.pipeline,
            built.generator,
            trained_on + heldout,
            frozen,
            {r.name for r in heldout},
            mesh,
            stop.check,
        )
        with stop.deferred():
            ended = loop(
                config,
                workdir.path,
                state,
                started,
                measured,
                built.step,
                frozen,
                functools.partial(device_batches, read, config, mesh),
                validation,
                checkpoints,
                stop,
            )
    if ended and stop.came:  # too late for the loop
        raise Stopped
    return ended


def open_folder(
    config: ConfigDict, workdir: Workdir, held: contextlib.ExitStack
) -> tuple[bool, str]:
    """Whether the run in the folder goes on, and the digest of its config; one process does this
    for all."""
    held.enter_context(identity.alone(workdir.path))
    if (done := max(checkpoint.steps(workdir), default=0)) > config.steps:
        raise InputError(
            f"{workdir.path} is at step {done} already, beyond steps={config.steps}: raise "
            "steps, or give another --workdir"
        )
    config_digest = identity.check_same_run(workdir, config)
    started = checkpoint.is_begun(workdir)
    if not started:
        prepared.remove(workdir.path / "prompts")  # of another config
        (workdir.path / "eval_prompts.json").unlink(missing_ok=True)
    return started, config_digest


def enable_compilation_cache(config: ConfigDict) -> None:
    """Compiled programs are kept on disk: a run that continues starts in seconds."""
    asked = config.compilation_cache
    if asked and not remote.url_of(asked):  # which JAX reaches by itself
        asked = os.path.expanduser(asked)
    jax.config.update("jax_compilation_cache_dir", asked or str(remote.cache()))


def check_encoded(encoded: EncodedPrompts, config: ConfigDict) -> None:
    """InputError for prompts that were encoded before, where they are not all that the config
    needs; rewards' features are looked at by `load_rewards`."""
    dataset.check_shards(encoded.folder)
    encoded.check_prompts(config.data.prompts)
    for section in (config.eval, config.test):
        if section.prompts:
            encoded.find(section.prompts, section.num_prompts)
    if config.regularizers.guidance.weight:
        encoded.check_guidance("regularizers.guidance")
    if config.test.prompts and config.test.guidance_scale > 1:
        encoded.check_guidance("the base's guidance in test")


def load_rewards(
    entries: ConfigDict, pipeline, config: ConfigDict, encoded: EncodedPrompts | None, trained: bool
) -> list[Reward]:
    """The rewards of one section of the config, each tried on random images first."""
    loaded = []
    for name, entry in entries.items():
        reward, features = rewards.load(name, entry, config.dtype, text=encoded is None), None
        if encoded is not None and reward.text_features is not None:
            encoded.check_reward(reward, entry)
            two = encoded.read(encoded_prompts.TRAIN, [0, encoded.rows[encoded_prompts.TRAIN] - 1])
            features = two[f"features/{name}"]
        plugin.check(reward, pipeline.image_shape, trained, features)
        loaded.append(reward)
        heartbeat.beat(f"the reward {name}'s files")
    return loaded


def loop(
    config: ConfigDict,
    folder: Path,
    state: TrainState,
    resumed: bool,
    measured: bool,
    step_fn,
    frozen,
    batches_from: Callable[[int], Iterator[dict[str, jax.Array]]],
    validation: Validation,
    checkpoints: checkpoint.Checkpoints,
    stop: StopSignal,
) -> bool:
    """Runs the remaining steps; False if a SIGTERM came meanwhile.

    `measured`: whether the checkpoint that the run continues from was evaluated.
    """
    step = first = int(state.step)
    if resumed:
        console.print(f"continues from step {first}", highlight=False)
    # Values of a checkpoint that does not have them yet are to come again.
    known = first if measured else first - 1
    early = EarlyStop(config.best_metric, config.early_stop, folder, known if resumed else -1)
    batches = batches_from(first)
    key = jax.random.key(config.seed)
    timing = Throughput(config.steps, config.batch_size, first)
    writer = MetricWriter(
        folder,
        config.tensorboard,
        config.wandb,
        resume_step=first if resumed else -1,
        evaluated=measured,
    )
    with writer, TrainingProgress(config.steps, first, console) as progress:

        def is_measured(step: int) -> bool:
            return step % config.eval_every == 0 or step == config.steps

        def measure() -> None:
            # A checkpoint that is being written meanwhile: whatever ends this costs no training,
            # and the next start makes up for it.
            with timing.paused():
                try:
                    values, sheet = validation(state.ema_params, step)
                except Stopped:
                    return
                writer.write(step, values)
                writer.write_images(step, {"samples": sheet})
                checkpoints.add_metrics(step, values)
                early.add(values.get(config.best_metric, math.nan))

        def fetch(metrics: dict[str, jax.Array], step: int) -> dict[str, float]:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values |= timing.update(step)
            progress.update(step, values)
            in_a_row = int(values["train/skipped_in_a_row"])
            if in_a_row >= config.max_skipped_in_a_row:
                writer.write(step, values)
                bad = [name for name, value in values.items() if not math.isfinite(value)]
                raise InputError(
                    f"the last {in_a_row} steps (to step {step}) were skipped: not finite were "
                    f"{', '.join(bad) or 'the updated parameters'}; start anew in another "
                    "--workdir with a lower optimizer.learning_rate or without the bad reward"
                )
            return values

        def log(metrics: dict[str, jax.Array], step: int) -> None:
            values = fetch(metrics, step)
            if step % config.log_every == 0 or is_measured(step):
                writer.write(step, values)

        if not resumed:
            save(checkpoints, state)
        if not measured and is_measured(step):
            measure()
        compiled = None
        pending = None  # metrics of the step before, fetched while this one runs
        while step < config.steps and not early.due and not stop.requested():
            batch = next(batches)
            if compiled is None:
                compiled = step_fn.lower(state, frozen, batch, key).compile()
                host_memory.give_back()  # before the step allocates its own
            heartbeat.beat(f"the batch of step {step + 1}")
            state, metrics = compiled(state, frozen, batch, key)
            step += 1
            if step == first + 1:
                check_copies(step, {"training state": state, "frozen weights": frozen})
            if pending is not None:
                log(pending, step - 1)
            pending = metrics
            if is_measured(step) or step % config.checkpoint_every == 0:
                # Metrics are on disk before their checkpoint: a kill in between loses none.
                log(pending, step)
                save(checkpoints, state)
                pending = None
            if is_measured(step):
                measure()
        if pending is not None:
            log(pending, step)
        if early.due:
            console.print(
                f"ended at step {step}: in {early.since} evaluations {early.metric} did "
                f"not exceed {early.best:.4g}",
                highlight=False,
            )
        if stopped := stop.requested():
            save(checkpoints, state)
            checkpoints.wait()
            console.print(f"stopped at step {step}, which is saved: the same command continues")
    return not stopped


def save(checkpoints: checkpoint.Checkpoints, state: TrainState) -> None:
    """Starts writing a checkpoint, of a state that is the same in all processes."""
    step = int(state.step)
    check_copies(step, {"training state": state})
    checkpoints.save(state)
    heartbeat.beat(f"the checkpoint of step {step}")


def check_copies(step: int, trees: dict[str, Any]) -> None:
    if jax.process_count() > 1:
        replicas.check(trees, step)


def device_batches(
    read: Callable[..., Iterator[dict[str, np.ndarray]]], config: ConfigDict, mesh: Mesh, step: int
) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, from `step` on."""
    split = sharding.batch_sharding(mesh)
    parts, count = sharding.local_parts(split)
    for batch in read(config.batch_size, config.seed, step, parts, count):
        yield sharding.put_batch(batch, split)
