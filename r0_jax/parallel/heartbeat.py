"""Signs that a run makes progress: whoever finishes something says so, and a watch may listen.

A run of many processes ends when none of them has finished anything for a long time
(`parallel.watch`). The modules that do the work speak to whoever listens in this context.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_listener: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar(
    "heartbeat", default=None
)


def beat(done: str) -> None:
    """Says that something came to its end, such as "step 12"."""
    if (listener := _listener.get()) is not None:
        listener(done)


@contextlib.contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Makes `listener` hear every `beat` inside, of this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
