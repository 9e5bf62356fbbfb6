"""Where the numbers of a training go: the files of its metrics and the progress line."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from r0_jax.console import TrainingProgress, console
from r0_jax.errors import InputError
from r0_jax.workdir.metrics import MetricWriter, Throughput


class StepLog:
    """Writes metrics.jsonl and its like, shows progress and measures the pace.

    A context manager, which opens the files and closes them.
    """

    def __init__(self, config: ConfigDict, folder: Path, resumed: int | None, measured: bool):
        """Take the step that the run resumes from, None for a new run.

        `measured`: whether that step was evaluated; its values are written again if not.
        """
        self._config, self._folder = config, folder
        self._resumed, self._measured = resumed, measured
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "StepLog":
        config, first = self._config, self._resumed or 0
        self._timing = Throughput(config.steps, config.batch_size, first)
        self._writer = self._held.enter_context(
            MetricWriter(
                self._folder,
                config.tensorboard,
                config.wandb,
                resume_step=-1 if self._resumed is None else first,
                evaluated=self._measured,
            )
        )
        self._progress = self._held.enter_context(TrainingProgress(config.steps, first, console))
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.__exit__(*exc)

    def step(self, step: int, metrics: Mapping[str, float], written: bool) -> None:
        """Show the metrics of a step and, if they are to be `written`, append them to the files.

        Raises InputError after too many skipped steps in a row.
        """
        values = {**metrics, **self._timing.update(step)}
        self._progress.update(step, values)
        in_a_row = int(values["train/skipped_in_a_row"])
        if in_a_row >= self._config.max_skipped_in_a_row:
            self._writer.write(step, values)
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            raise InputError(
                f"the last {in_a_row} steps (to step {step}) were skipped: not finite were "
                f"{', '.join(bad) or 'the updated parameters'}; start anew in another "
                "--workdir with a lower optimizer.learning_rate or without the bad reward"
            )
        if written:
            self._writer.write(step, values)

    def evaluation(
        self, step: int, values: Mapping[str, float], sheet: UInt8[np.ndarray, "h w 3"]
    ) -> None:
        """Append what an evaluation found, and its images."""
        self._writer.write(step, values)
        self._writer.write_images(step, {"samples": sheet})

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave the time spent inside out of the pace of the training."""
        return self._timing.paused()
