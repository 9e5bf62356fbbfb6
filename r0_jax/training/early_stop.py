"""Training that ends when what it is judged by no longer grows."""

import math
from pathlib import Path

from r0_jax.evaluation import curves


class EarlyStop:
    """Counts evaluations since the highest value of a metric.

    A run that continues goes by what its metrics.jsonl says up to the step that it continues from,
    so that it ends where it would have ended undisturbed.
    """

    def __init__(self, metric: str, patience: int, folder: Path, step: int):
        """With a `patience` of 0 it never ends; else after so many evaluations without a new
        highest value. `step`: of the checkpoint that `folder`'s run continues from."""
        self.metric, self.patience = metric, patience
        self.best, self.since = -math.inf, 0
        path = folder / "metrics.jsonl"
        if patience and path.is_file():
            series, _ = curves.read(path)
            for at, value in sorted(series.get(metric, {}).items()):
                if at <= step:
                    self.add(value)

    def add(self, value: float) -> None:
        """The metric at the next evaluation; NaN is no new highest value."""
        if value > self.best:
            self.best, self.since = value, 0
        else:
            self.since += 1

    @property
    def due(self) -> bool:
        """Whether training is to end here."""
        return 0 < self.patience <= self.since
