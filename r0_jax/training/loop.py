"""The loop of the training: a batch, a step, the log of the step before, a save, a measurement."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r0_jax import compilation_cache
from r0_jax.config import trained_rewards
from r0_jax.console import console
from r0_jax.evaluation.hacking import VETOED
from r0_jax.evaluation.validation import Validation
from r0_jax.method.train_state import TrainState
from r0_jax.parallel import heartbeat, replicas, sharding
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.training import host_memory
from r0_jax.training.balance import Balance
from r0_jax.training.early_stop import EarlyStop
from r0_jax.training.profile import Profile
from r0_jax.training.program import Program
from r0_jax.training.step_log import StepLog
from r0_jax.training.watch import Watch
from r0_jax.workdir.checkpoint_manager import Checkpoints

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What the loop works with.

    Attributes:
      frozen: the weights that are not trained, on the devices.
      batches_from: step -> the batches of the steps after it, on the devices.
      folder: of the run, on this machine.
    """

    program: Program
    frozen: dict[str, Any]
    batches_from: Callable[[int], Iterator[Batch]]
    validation: Validation
    checkpoints: Checkpoints
    folder: Path
    stop: StopSignal


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The state that the loop starts from.

    Attributes:
      resumed: whether it comes from a checkpoint.
      measured: whether that checkpoint was evaluated.
    """

    state: TrainState
    resumed: bool
    measured: bool


class Loop:
    """The steps from `start` to the config's last one."""

    def __init__(self, job: Job, start: Start):
        self.job, self.start, self.config = job, start, job.program.config
        self.state = start.state
        self.step = self.first = int(start.state.step)
        self.compiled: Callable[..., tuple[TrainState, Metrics]] | None = None
        self.compiled_norms: Callable[..., Metrics] | None = None
        self.key = _key(self.config.seed, job.program.mesh)
        # An evaluation that is missing in its checkpoint is made again.
        known = self.first if start.measured else self.first - 1
        self.early = EarlyStop(
            self.config.best_metric,
            self.config.early_stop,
            job.folder,
            known if start.resumed else -1,
        )
        self.log = StepLog(
            self.config, job.folder, self.first if start.resumed else None, start.measured
        )
        self.profile = Profile(self.config.profile, job.folder, self.first)
        self.balance, self.watch = Balance(), Watch(job.folder)
        self._batches = job.batches_from(self.first)
        self._peeked: Batch | None = None  # read already, for the step that comes

    def run(self) -> bool:
        """Run the remaining steps; return False if a SIGTERM ended them."""
        if self.start.resumed:
            console.print(f"continues from step {self.first}", highlight=False)
        with self.log, self.profile:
            self._save_and_measure_the_start()
            previous = None  # metrics of the step before, fetched while this one runs
            while self._has_more_steps():
                metrics = self._start_step(self._next_batch())
                if previous is not None:
                    self._log(self.step - 1, previous)
                previous = metrics
                if self._is_saved():
                    # Metrics are on disk before their checkpoint: a kill in between loses none.
                    self._log(self.step, metrics)
                    previous = None
                    self._save()
                if self._is_measured(self.step):
                    self._measure()
            if previous is not None:
                self._log(self.step, previous)
            return self._end()

    def _save_and_measure_the_start(self) -> None:
        if not self.start.resumed:
            self._save()
        if not self.start.measured and self._is_measured(self.step):
            self._measure()

    def _peek(self) -> Batch:
        """Return the batch of the next step, which stays the next one."""
        if self._peeked is None:
            self._peeked = next(self._batches)
        return self._peeked

    def _next_batch(self) -> Batch:
        batch, self._peeked = self._peek(), None
        return batch

    def _has_more_steps(self) -> bool:
        return (
            self.step < self.config.steps and not self.early.due and not self.job.stop.requested()
        )

    def _is_measured(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _is_saved(self) -> bool:
        return self._is_measured(self.step) or self.step % self.config.checkpoint_every == 0

    def _start_step(self, batch: Batch) -> Metrics:
        """Start the next step on the devices; return its metrics, for which nobody has waited."""
        if self.compiled is None:
            self.compiled = self._compile(batch)
        heartbeat.beat(f"the batch of step {self.step + 1}")
        with (
            self._transfers_guarded(),
            jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1),
        ):
            self.state, metrics = self.compiled(self.state, self.job.frozen, batch, self.key)
        self.step += 1
        self.profile.note(self.step, metrics)
        if self.step == self.first + 1:
            self._check_copies({"training state": self.state, "frozen weights": self.job.frozen})
        return metrics

    def _compile(self, batch: Batch) -> Callable[..., tuple[TrainState, Metrics]]:
        lowered = self.job.program.step.lower(self.state, self.job.frozen, batch, self.key)
        compiled = compilation_cache.compile_kept(lowered)
        host_memory.give_back()  # before the step allocates its own
        return compiled

    def _transfers_guarded(self) -> contextlib.AbstractContextManager[None]:
        """Make it an error if a step's arguments are not where it reads them: moving delays it."""
        # Only around the step itself: batches are put on the devices before it, metrics are fetched
        # after it, and saves and evaluations wait for the devices anyway. Not where a reward is a
        # user's function: it may call back into Python. JAX runs the callback in this thread on
        # CPUs and single GPUs, and there the guard would forbid what the user does in it.
        if any(entry.function for entry in trained_rewards(self.config).values()):
            return contextlib.nullcontext()
        return jax.transfer_guard("disallow")

    def _log(self, step: int, metrics: Metrics) -> None:
        """Fetch and log the metrics of a step; wait for it where it still runs."""
        written = step % self.config.log_every == 0 or self._is_measured(step)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.log.step(step, values, written)
        self.balance.add(values)

    def _save(self) -> None:
        """Start to write a checkpoint, of a state that is the same in all processes."""
        self._check_copies({"training state": self.state})
        self.job.checkpoints.save(self.state)
        heartbeat.beat(f"the checkpoint of step {self.step}")

    def _check_copies(self, trees: dict[str, Any]) -> None:
        if jax.process_count() > 1:
            replicas.check(trees, self.step)

    def _measure(self) -> None:
        """Evaluate the checkpoint of this step, which may still be being written.

        A SIGTERM breaks it off. That costs no training, and the next start evaluates again.
        """
        with self.log.paused():
            try:
                values, sheet = self.job.validation(self.state.ema_params, self.step)
            except Stopped:
                return
            self.log.evaluation(self.step, values | self._term_norms(), sheet)
            best = values.get(self.config.best_metric, math.nan)
            score = math.nan if values[VETOED] else best
            self.job.checkpoints.add_metrics(self.step, values, score)
            if jax.process_index() == 0:
                self.watch.write()
            self.early.add(score)
            self.balance.check()

    def _term_norms(self) -> dict[str, float]:
        """Return the gradient norm of each term alone, on the batch that comes next."""
        if not self.config.eval.term_norms:
            return {}
        read = (self.state, self.job.frozen, self._peek(), self.key)
        if self.compiled_norms is None:
            lowered = self.job.program.term_norms.lower(*read)
            self.compiled_norms = compilation_cache.compile_kept(lowered)
        norms = self.compiled_norms(*read)
        heartbeat.beat("the gradient norms of the terms")
        return {name: float(value) for name, value in jax.device_get(norms).items()}

    def _end(self) -> bool:
        """Say why the steps ended; return False after a SIGTERM, when the state is saved."""
        if self.early.due:
            console.print(
                f"ended at step {self.step}: in {self.early.since} evaluations "
                f"{self.early.metric} did not exceed {self.early.best:.4g}",
                highlight=False,
            )
        if not self.job.stop.requested():
            return True
        self._save()
        self.job.checkpoints.wait()
        console.print(f"stopped at step {self.step}, which is saved: the same command continues")
        return False


def _key(seed: int, mesh: Mesh) -> jax.Array:
    """Return the key of a seed on all devices, where the step reads it."""
    make = jax.jit(lambda: jax.random.key(seed), out_shardings=sharding.replicated(mesh))
    return make()
