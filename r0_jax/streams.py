"""stdout and stderr of a command, where a reader may go away and a disk may be full."""

import io
import os
import sys
from typing import Any


class _Stream:
    """A text stream whose reader may be gone; what nobody can read is no reason to stop.

    A closed pipe is ignored for both streams. stderr holds warnings and progress alone, so that
    nothing of it ends a command; an error of stdout says that it is stdout.
    """

    def __init__(self, stream: io.TextIOWrapper, name: str):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # What is buffered, and all that comes, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._name == "stdout" and not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, self._name) from None


def guard() -> None:
    """Let stdout and stderr take any text, and survive readers that go away.

    Descriptors that are closed lead nowhere, else the next open file would be one of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # None or another object in some programs
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Stream(stream, name))
