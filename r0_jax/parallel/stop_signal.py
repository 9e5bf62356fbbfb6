"""SIGTERM, by which machines are taken back: the run saves what it trained first."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np

from r0_jax import signals
from r0_jax.parallel import sharding


class Stopped(BaseException):
    """A SIGTERM came while there was nothing to save.

    Like KeyboardInterrupt it is not an Exception: it may come inside any call, where code that
    catches what is wrong with a file or a reward would catch it, too.
    """


class StopSignal:
    """Handles SIGTERM; a context manager.

    It raises Stopped at once or, inside `deferred`, makes `requested` true on all processes at the
    same step.

    Attributes:
      came: whether one came to this process.
    """

    def __init__(self) -> None:
        self.came = self._deferred = False
        self._asked: jax.Array | None = None  # the last answer of all processes

    def __enter__(self) -> "StopSignal":
        self._handling = signals.handling(signal.SIGTERM, self._note, Stopped, lost=self._forget)
        self._handling.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._handling.__exit__(None, None, None)

    def _forget(self) -> None:
        self.came = False  # the signal comes again, and is to raise again

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        again, self.came = self.came, True
        if (
            not self._deferred and not again
        ):  # a second one does not break off what the first one began
            raise Stopped

    def defer(self) -> None:
        """Only note a SIGTERM from here on."""
        self._deferred = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a SIGTERM inside."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise Stopped if a SIGTERM came; inside `deferred`, where work may stay undone."""
        if self.requested():
            raise Stopped

    def requested(self) -> bool:
        """Return whether a SIGTERM came, with many processes whether one came before the last call.

        The answer travels behind the step that is being computed, for which this does not wait.
        All processes call it equally often.
        """
        if jax.process_count() == 1:
            return self.came
        # Preemption may reach one host first: stop together, or collectives wait for ever.
        before, self._asked = self._asked, sharding.any_process(self.came)
        return before is not None and bool(np.asarray(before))
