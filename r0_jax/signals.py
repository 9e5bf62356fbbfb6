"""Ctrl-C and SIGTERM end a command, wherever they come."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from r0_jax.errors import Terminated

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
else:  # Python keeps the class to itself
    UnraisableHookArgs = object

_AGAIN = 0.05  # seconds after which a signal that was lost comes again
_LOST: list[int] = []  # signals that a callback has swallowed


def end_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the program without a word, with the status 130 or 143.

    It is for a command's imports, which take seconds, and for its last moments: there is nothing to
    clean up then. A signal that the user's shell ignores stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not a handler of Python
            signal.signal(number, _end)


def guard() -> None:
    """Make Ctrl-C raise KeyboardInterrupt and SIGTERM Terminated, also where a callback runs.

    A signal that the user's shell ignores stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _end):
        signal.signal(signal.SIGTERM, _terminate)
    _send_again(KeyboardInterrupt, signal.SIGINT)
    _send_again(Terminated, signal.SIGTERM)


@contextlib.contextmanager
def handling(
    number: int,
    handler: Callable[[int, FrameType | None], None],
    raises: type[BaseException],
    lost: Callable[[], None],
) -> Iterator[None]:
    """Let a handler that raises one kind of exception have a signal inside.

    Where a callback swallows the exception, `lost` is called, and the signal comes again.
    """
    before = signal.signal(number, handler)
    unraisable = sys.unraisablehook
    ours = _send_again(raises, number, lost)
    try:
        yield
    finally:
        signal.signal(number, before)
        if sys.unraisablehook is ours:
            sys.unraisablehook = unraisable


def lost() -> BaseException | None:
    """Return what a lost signal would have raised, for a command that ended before it came again.

    No signal comes again after this call.
    """
    pending, _LOST[:] = list(_LOST), []
    if not pending:
        return None
    return KeyboardInterrupt() if pending[0] == signal.SIGINT else Terminated()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    os._exit(128 + number)  # an exception would be told by a traceback, or caught by a library


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise Terminated


def _send_again(
    raised: type[BaseException], number: int, lost: Callable[[], None] = lambda: None
) -> Callable[[UnraisableHookArgs], None]:
    """Send a signal again where a callback swallows what its handler raised.

    Python drops what is raised in a callback of its garbage collector (JAX has one) or in a
    destructor. Returns the hook that notices.
    """
    before = sys.unraisablehook

    def hook(event: UnraisableHookArgs) -> None:
        if isinstance(event.exc_value, raised):
            lost()
            _again(number)
        else:
            before(event)

    sys.unraisablehook = hook
    return hook


def _again(number: int) -> None:
    def send() -> None:
        if number in _LOST:
            _LOST.remove(number)
            os.kill(os.getpid(), number)

    _LOST.append(number)
    timer = threading.Timer(_AGAIN, send)
    timer.daemon = True
    timer.start()
