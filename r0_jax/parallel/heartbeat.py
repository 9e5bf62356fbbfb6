"""Signs of progress: whoever finishes something says so, and a watch may listen.

A run of many processes ends when none of them has finished anything for a long time
(`parallel.watch`). The modules that do the work speak to the listener of this context.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_listener: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar(
    "heartbeat", default=None
)


def beat(done: str) -> None:
    """Say that something is done, such as "step 12"."""
    if (listener := _listener.get()) is not None:
        listener(done)


@contextlib.contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Let `listener` hear every `beat` of this thread inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
