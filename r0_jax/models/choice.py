"""What is chosen for the program that is being traced, and by every layer within it looked up."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Choice(Generic[T]):
    """A value that holds while a program is traced, of this thread."""

    def __init__(self, name: str, default: T):
        self._value = contextvars.ContextVar(name, default=default)

    def get(self) -> T:
        """The choice of the innermost `use`, or the default."""
        return self._value.get()

    @contextlib.contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Makes it the choice of what is traced meanwhile."""
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)
