"""A choice for the program that is being traced, which each of its layers can look up."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Choice(Generic[T]):
    """Hold a value of this thread while a program is traced."""

    def __init__(self, name: str, default: T):
        self._value = contextvars.ContextVar(name, default=default)

    def get(self) -> T:
        """Return the value of the innermost `use`, or the default."""
        return self._value.get()

    @contextlib.contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Set the value for what is traced meanwhile."""
        token = self._value.set(value)
        try:
            yield
        finally:
            self._value.reset(token)
