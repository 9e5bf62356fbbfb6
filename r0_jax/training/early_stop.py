"""Ends a training when its best metric no longer grows."""

import math
from pathlib import Path

from r0_jax.evaluation import curves
from r0_jax.evaluation.hacking import VETOED


class EarlyStop:
    """Counts evaluations since the highest value of a metric.

    A resumed run reads its metrics.jsonl up to the step that it resumes from, so that it ends
    where it would have ended undisturbed.
    """

    def __init__(self, metric: str, patience: int, folder: Path, step: int):
        """Read the values of the run in `folder` up to `step`, from which it resumes.

        `patience`: the evaluations without a new highest value that end it; 0 never ends it.
        """
        self.metric, self.patience = metric, patience
        self.best, self.since = -math.inf, 0
        path = folder / "metrics.jsonl"
        if patience and path.is_file():
            series, _ = curves.read(path)
            vetoed = series.get(VETOED, {})
            for at, value in sorted(series.get(metric, {}).items()):
                if at <= step:
                    self.add(math.nan if vetoed.get(at) else value)

    def add(self, value: float) -> None:
        """Add the metric of the next evaluation; NaN, of a vetoed one, is no new highest value."""
        if value > self.best:
            self.best, self.since = value, 0
        else:
            self.since += 1

    @property
    def due(self) -> bool:
        """Whether the training is to end here."""
        return 0 < self.patience <= self.since
