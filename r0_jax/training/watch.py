"""The report of a run while it trains, so that it can be watched."""

import time
import warnings
from pathlib import Path

from r0_jax.errors import InputError
from r0_jax.evaluation import report

_SHARE = 0.02  # of the time, at most


class Watch:
    """Writes the report at evaluations, unless drawing its curves would slow the training down."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._ended, self._seconds = 0.0, 0.0  # of the last time

    def write(self) -> None:
        """Write the report, if the last one took at most a fiftieth of the time since then.

        What it cannot read, such as a broken eval.json of an earlier end, warns: training does not
        depend on it.
        """
        began = time.monotonic()
        if self._seconds <= _SHARE * (began - self._ended):
            try:
                report.write_report(self._folder)
            except InputError as error:
                warnings.warn(f"the report is not written: {error}", stacklevel=2)
            self._ended = time.monotonic()
            self._seconds = self._ended - began
