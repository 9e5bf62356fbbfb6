"""Ctrl-C and SIGTERM end a command, wherever they come."""

import os
import signal
import sys
import threading
from typing import NoReturn

from r0_jax.errors import Terminated

_AGAIN = 0.05  # seconds after which a signal that was lost comes again
_LOST: list[int] = []  # signals that a callback has swallowed


def guard() -> None:
    """Make SIGTERM raise Terminated, and send both signals again where a callback swallows them.

    Python drops what is raised in a callback of its garbage collector (JAX has one) or in a
    destructor. A signal that the user's shell ignores stays ignored.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    before = sys.unraisablehook

    def unraisable(event) -> None:
        if isinstance(event.exc_value, KeyboardInterrupt):
            _again(signal.SIGINT)
        elif isinstance(event.exc_value, Terminated):
            _again(signal.SIGTERM)
        else:
            before(event)

    sys.unraisablehook = unraisable


def lost() -> BaseException | None:
    """Return what a lost signal would have raised, for a command that ended before it came again.

    No signal comes again after this call.
    """
    pending, _LOST[:] = list(_LOST), []
    if not pending:
        return None
    return KeyboardInterrupt() if pending[0] == signal.SIGINT else Terminated()


def _terminate(number: int, frame: object) -> NoReturn:
    del number, frame
    raise Terminated


def _again(number: int) -> None:
    def send() -> None:
        if number in _LOST:
            _LOST.remove(number)
            os.kill(os.getpid(), number)

    _LOST.append(number)
    timer = threading.Timer(_AGAIN, send)
    timer.daemon = True
    timer.start()
