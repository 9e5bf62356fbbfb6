"""The report of a run while it trains, so that it can be watched."""

import time
from pathlib import Path

from r0_jax.evaluation import report

_SHARE = 0.02  # of the time, at most


class Watch:
    """Writes the report at evaluations, unless drawing its curves would slow the training down."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._ended, self._seconds = 0.0, 0.0  # of the last time

    def write(self) -> None:
        """Write the report, if the last one took at most a fiftieth of the time since then."""
        began = time.monotonic()
        if self._seconds <= _SHARE * (began - self._ended):
            report.write_report(self._folder)
            self._ended = time.monotonic()
            self._seconds = self._ended - began
