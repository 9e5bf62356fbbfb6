"""Regular expressions of configs, which may be invalid or take years."""

import contextlib
import re
import signal
import threading
from collections.abc import Iterable, Iterator

from r0_jax.errors import InputError

_SECONDS = 5.0  # for all names of a network; a usual pattern takes milliseconds


class _TooLongError(Exception):
    """Time is up."""


def matching(pattern: str, names: Iterable[str], field: str) -> list[str]:
    """Return, in order, the names that a pattern matches whole.

    Raise InputError, which names the config's `field`, for a pattern that is invalid or takes
    longer than seconds, as "(.*.*)*X" does. Threads other than the main one have no limit of time.
    """
    try:
        with _limit(_SECONDS):
            compiled = re.compile(pattern)
            return [name for name in names if compiled.fullmatch(name)]
    except _TooLongError:
        raise InputError(
            f"{field}={pattern!r} takes too long: give a simpler regular expression, without "
            "repeats inside repeats"
        ) from None
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{field} is not a regular expression ({error}): {pattern!r}") from None


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _TooLongError inside after some seconds; `re` looks for signals while it matches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, late)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)
