"""A trace of a few early steps, for TensorBoard's profiler."""

from pathlib import Path
from typing import Any

import jax

from r0_jax.console import console


class Profile:
    """Traces some steps of process 0 into `folder`/tensorboard/plugins/profile.

    A context manager: it ends a trace that is still on.
    """

    def __init__(self, steps: int, folder: Path, first: int):
        """Trace so many `steps`, 0 for none, of a run that starts from the step `first`.

        The step after `first` is not traced, since it is compiled.
        """
        self._folder = folder / "tensorboard"
        self._before, self._last = first + 1, first + 1 + steps
        self._is_asked = steps > 0 and jax.process_index() == 0
        self._is_on = False

    def note(self, step: int, result: Any) -> None:
        """Start or end the trace where it is due after `step`, whose `result` is waited for."""
        if not self._is_asked or step not in (self._before, self._last):
            return
        jax.block_until_ready(result)
        if step == self._before:
            jax.profiler.start_trace(self._folder)
            self._is_on = True
        else:
            self._end()

    def _end(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()
        console.print(f"profile: tensorboard --logdir={self._folder}", highlight=False)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._is_on:
            self._end()
