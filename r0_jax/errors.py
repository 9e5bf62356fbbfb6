"""What a user did wrong, said in one line, and the exit status that goes with it."""

import errno
import os
import re

BUG = 1  # exit status, as Python has it
USER_ERROR = 2  # as argparse and most Unix tools have it
INTERRUPTED = 130  # 128 + SIGINT
STOPPED = 75  # sysexits' "try again": by a SIGTERM, before the end

_DISK_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions or choose another one",
    errno.ENAMETOOLONG: "give the path of a file or folder",
}


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do.

    Entry points print it to stderr and exit with status 2; nothing else catches it.
    """


class UnreachableError(InputError):
    """An object store does not answer: as bad input, but with status 1, for a restart may do."""


def explain(error: BaseException) -> tuple[int, str | None]:
    """The exit status, and the line that says what a user can do; None of Ctrl-C and of bugs."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, None
    line = str(error) if isinstance(error, InputError) else disk_problem(error)
    if line is None:
        return BUG, None
    status = BUG if isinstance(error, UnreachableError) else USER_ERROR
    return status, " ".join(line.splitlines())


def disk_problem(error: BaseException | None) -> str | None:
    """What a user can do about it, or None where `error` is not about the disk."""
    if error is None:
        return None
    code = path = None
    if isinstance(error, OSError):
        code, path = error.errno, error.filename
    elif isinstance(error, ValueError | RuntimeError):
        # C++ libraries, tensorstore under orbax and array_record, say it only in their text.
        code = next((code for code in _DISK_ADVICE if os.strerror(code) in str(error)), None)
        found = re.search(r'(?:local file "|; writing )([^";]+)', str(error))
        path = found and found[1]
    if code not in _DISK_ADVICE:
        return disk_problem(error.__cause__)
    reason = os.strerror(code).lower()
    return (f"{path}: " if path else "") + f"{reason}; {_DISK_ADVICE[code]}"
