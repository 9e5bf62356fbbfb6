"""Training from a config to a report, in the order in which things happen."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from r0_jax import config_check
from r0_jax.console import console
from r0_jax.errors import InputError, of_config
from r0_jax.evaluation import report, result_table, testbed
from r0_jax.evaluation.validation import Validation
from r0_jax.parallel import distributed, heartbeat, sharding
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.order import Draws
from r0_jax.training import pretrained, program
from r0_jax.training.loop import Batch, Job, Loop, Start
from r0_jax.training.pretrained import Pretrained
from r0_jax.training.program import Program
from r0_jax.weights import lazy
from r0_jax.workdir import checkpoint, identity, origin
from r0_jax.workdir.checkpoint_manager import Checkpoints
from r0_jax.workdir.run import Run
from r0_jax.workdir.workdir import Workdir

# (draws, parts, of how many) -> this process's parts of the batches.
ReadBatches = Callable[[Draws, Sequence[int], int], Iterator[dict[str, np.ndarray]]]


def train_and_evaluate(config: ConfigDict, workdir: Workdir, stop: StopSignal) -> bool:
    """Train to `config.steps`, then make the table and the report.

    Resumes from the newest checkpoint of `workdir`, if it has one. A SIGTERM in training saves
    and returns False; at any other time it raises Stopped.
    """
    with contextlib.ExitStack() as held:
        if not _train(config, workdir, stop, held):
            return False
        # Here the devices hold nothing of the training any more.
        table = testbed.evaluate_run(Run(workdir, config)) if config.test.prompts else None
        if jax.process_index() == 0:
            if table is not None:
                result_table.print_table(table)
            print(f"report: {report.write_report(workdir.path)}")
        return True


def _train(
    config: ConfigDict, workdir: Workdir, stop: StopSignal, held: contextlib.ExitStack
) -> bool:
    """Return whether the training came to its end; `held` keeps other runs out of the folder."""
    mesh = check(config)
    models = pretrained.load(config)
    with of_config():
        built = program.build(config, mesh, models.pipeline, models.rewards, models.prompts)
    begun, digest = distributed.of_first(
        lambda: take_workdir(config, workdir, models.pipeline, held)
    )
    identity.check_shared(workdir)
    read = prepare_prompts(config, workdir, models, begun)
    workdir.share()
    frozen = place_frozen(built)
    with Checkpoints(workdir, config.keep_checkpoints, digest) as checkpoints:
        start = restore_or_init(built, frozen, checkpoints, begun)
        validation = Validation(
            config,
            workdir.path,
            built.pipeline,
            built.generator,
            models.prompts,
            models.rewards + models.heldout,
            frozen,
            {reward.name for reward in models.heldout},
            mesh,
            stop.check,
        )
        batches_from = functools.partial(device_batches, read, config, mesh)
        job = Job(built, frozen, batches_from, validation, checkpoints, workdir.path, stop)
        with stop.deferred():
            ended = Loop(job, start).run()
    if ended and stop.came:  # too late for the loop
        raise Stopped
    return ended


def check(config: ConfigDict) -> Mesh:
    """Return the mesh of a config; raise InputError where the config is invalid.

    It is also invalid in a process where it differs from that of process 0.
    """
    identity.check_same_everywhere(config)
    with of_config():
        config_check.check_config(config)
        testbed.check(config.test, config.heldout_rewards)
        mesh = sharding.make_mesh(config.mesh.to_dict())
        sharding.microbatches(config.batch_size, config.device_batch, mesh)
        sharding.param_sharding({}, mesh, config.sharding)  # the form of the rules alone
        return mesh


def take_workdir(
    config: ConfigDict, workdir: Workdir, pipeline: Pipeline, held: contextlib.ExitStack
) -> tuple[bool, str]:
    """Make the folder this run's own; one process does it for all.

    Returns whether it holds the run's checkpoints, and the digest of the config. Raises InputError
    for the folder of another run, or of one that began with other pretrained weights. `held` keeps
    other processes out of it.
    """
    held.enter_context(identity.alone(workdir.path))
    if (done := max(checkpoint.steps(workdir), default=0)) > config.steps:
        raise InputError(
            f"{workdir.path} is at step {done} already, beyond steps={config.steps}: raise "
            "steps, or give another --workdir"
        )
    digest = identity.check_same_run(workdir, config)
    begun = checkpoint.is_begun(workdir)
    if not begun:  # it may be of another config
        (workdir.path / "eval_prompts.json").unlink(missing_ok=True)
    if begun and origin.is_kept(workdir.path):
        origin.check(workdir.path, pipeline, "bring the original back, give another --workdir")
    else:
        origin.keep(workdir.path, pipeline)
    return begun, digest


def prepare_prompts(
    config: ConfigDict, workdir: Workdir, models: Pretrained, begun: bool
) -> ReadBatches:
    """Prepare the prompts that the run can draw; return how to read batches of them."""
    folder = workdir.path / "prompts"

    def prepare() -> str:
        # A damaged checkpoint makes a run resume from an older one.
        draws = draws_from(config, min(checkpoint.steps(workdir), default=0))
        return models.prompts.prepare(
            folder, models.pipeline, models.rewards, models.heldout, draws, begun
        )

    counted = distributed.of_first(prepare)
    console.print(f"{counted}; {config.steps} steps of {config.batch_size}", highlight=False)
    return functools.partial(models.prompts.batches, folder, models.pipeline, models.rewards)


def draws_from(config: ConfigDict, step: int) -> Draws:
    """Return the batches that a run can read from a step on.

    The last measurement of the terms' norms is on the batch after the last step.
    """
    last = config.steps + int(config.eval.term_norms)
    return Draws(config.batch_size, config.seed, range(step, last))


def place_frozen(built: Program) -> dict[str, Any]:
    """Read the weights that are not trained onto the devices."""
    frozen = lazy.place(
        built.frozen,
        built.frozen_sharding,
        placed=functools.partial(heartbeat.beat, "a tensor's place on the devices"),
    )
    trained = parameter_overview.count_parameters(built.abstract_state.params)
    console.print(f"{trained:,} trained parameters", highlight=False)
    return frozen


def restore_or_init(
    built: Program, frozen: dict[str, Any], checkpoints: Checkpoints, begun: bool
) -> Start:
    """Return the state to start from, on the devices."""
    # In this order:
    # 1. The run has checkpoints: resume from the newest one that is whole.
    # 2. It has none: start from the pretrained weights.
    if begun:
        state, metadata = checkpoints.restore(built.abstract_state)
        return Start(state, resumed=True, measured=bool(metadata["metrics"]))
    base = frozen["base"]
    if not built.config.lora.rank and built.config.dtype != "float32":
        # All weights are trained: from the file's own values, not from their rounding, which is
        # larger than several steps.
        base = lazy.place(built.frozen["base"], built.frozen_sharding["base"], "float32")
    state = jax.jit(built.init, out_shardings=built.state_sharding)(base)
    return Start(state, resumed=False, measured=False)


def device_batches(read: ReadBatches, config: ConfigDict, mesh: Mesh, step: int) -> Iterator[Batch]:
    """Yield global batches on the devices, from `step` on."""
    split = sharding.batch_sharding(mesh)
    parts, count = sharding.local_parts(split)
    for batch in read(draws_from(config, step), parts, count):
        yield sharding.put_batch(batch, split)
