"""SIGTERM, which is how machines are taken back: what was trained is saved first."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from r0_jax.parallel import sharding


class Stopped(BaseException):
    """A SIGTERM came while nothing was to be saved: what was trained is saved already.

    As KeyboardInterrupt is, no Exception: it may come inside of any call, and whoever asks there
    what is wrong with a file or a reward would take it for the answer.
    """


class StopSignal:
    """What a SIGTERM does: raise Stopped at once, or, inside `deferred`, make `requested` true on
    all processes at the same step. A context manager.

    Attributes:
      came: whether one came to this process.
    """

    def __init__(self):
        self.came = self._deferred = False
        self._asked: jax.Array | None = None  # the answer of all processes, of the last time

    def __enter__(self) -> "StopSignal":
        self._before = signal.signal(signal.SIGTERM, self._note)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._again
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if sys.unraisablehook == self._again:
            sys.unraisablehook = self._unraisable

    def _again(self, event: Any) -> None:
        """A signal that comes within a callback, of the garbage collector say, is lost there."""
        if isinstance(event.exc_value, Stopped):
            self.came = False
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            self._unraisable(event)

    def _note(self, number: int, frame: object) -> None:
        del number, frame
        again, self.came = self.came, True
        if not self._deferred and not again:  # what the first one began is not broken off
            raise Stopped

    def defer(self) -> None:
        """From here on a SIGTERM is only noted."""
        self._deferred = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raises Stopped where one is requested; within `deferred`, for what may stay undone."""
        if self.requested():
            raise Stopped

    def requested(self) -> bool:
        """With many processes whether one was asked before the last call: the answer travels
        behind the step that is being computed, which nobody waits for here. All call it equally
        often."""
        if jax.process_count() == 1:
            return self.came
        # Preemption may reach one host first: stop together, or collectives wait for ever.
        before, self._asked = self._asked, sharding.any_process(self.came)
        return before is not None and bool(np.asarray(before))
