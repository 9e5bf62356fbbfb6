"""Errors of users, told in one line, and their exit statuses."""

import contextlib
import errno
import os
import re
import unicodedata
from collections.abc import Iterator

from r0_jax import machine

# Exit statuses.
BUG = 1  # as in Python
USER_ERROR = 2  # as in argparse and most Unix tools
INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM
STOPPED = 75  # stopped by SIGTERM before the end; sysexits' "try again"

# Characters of a word and of a line that are shown.
_WORD = 1000
_LINE = 4000

_DISK_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions or choose another one",
    errno.ENAMETOOLONG: "give the path of a file or folder",
}


class InputError(Exception):
    """Invalid input. The message is one line that says what is wrong and what to do.

    Commands print it to stderr and exit with status 2.
    """


class ConfigError(InputError):
    """An invalid config. Commands say before the message what file they have it from."""


class UnreachableError(InputError):
    """An object store that does not answer. The exit status is 1, since a restart may help."""


class Terminated(BaseException):
    """A SIGTERM came. Like KeyboardInterrupt it passes by what catches errors, and cleans up."""


@contextlib.contextmanager
def of_config() -> Iterator[None]:
    """Let every InputError inside be a ConfigError."""
    try:
        yield
    except InputError as error:
        raise ConfigError(str(error)) from None


def explain(error: BaseException) -> tuple[int, str | None]:
    """Return the exit status, and the line for the user; None for signals and for bugs."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, None
    if isinstance(error, Terminated):
        return TERMINATED, None
    if isinstance(error, InputError):
        line: str | None = str(error)
    else:
        line = disk_problem(error) or machine.problem(error)
    if line is None:
        return BUG, None
    status = BUG if isinstance(error, UnreachableError) else USER_ERROR
    return status, printable(line)


def printable(text: str) -> str:
    """Return a text of any origin as one line that is safe to show on a terminal.

    Control characters, which could move the cursor or reverse the text, become escapes such as
    \\x1b. Very long words and lines are cut in their middle.
    """
    line = " ".join(text.splitlines())
    line = re.sub(rf"\S{{{_WORD + 1},}}", lambda word: _cut(word[0], _WORD), line)
    return "".join(map(_escape, _cut(line, _LINE)))


def _escape(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # a kind of space
        return character
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def disk_problem(error: BaseException | None) -> str | None:
    """Return a line with advice for an error of the disk, or None for other errors."""
    if error is None:
        return None
    code = path = None
    if isinstance(error, OSError):
        # Of a copy or a move, the second is what is written.
        code, path = error.errno, error.filename2 or error.filename
    elif isinstance(error, ValueError | RuntimeError):
        # tensorstore (below orbax) and array_record name the error only in their text.
        code = next((code for code in _DISK_ADVICE if os.strerror(code) in str(error)), None)
        found = re.search(r'(?:local file "|; writing )([^";]+)', str(error))
        path = found and found[1]
    if code not in _DISK_ADVICE:
        return disk_problem(error.__cause__)
    reason = os.strerror(code).lower()
    return (f"{path}: " if path else "") + f"{reason}; {_DISK_ADVICE[code]}"
