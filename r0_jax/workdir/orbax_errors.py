"""Errors of orbax when the disk or a store fails: one line instead of a page of tracebacks."""

import contextlib
import errno
import functools
import logging as python_logging
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import logging

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.workdir.workdir import AnyPath

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
else:  # Python keeps the class to itself
    UnraisableHookArgs = object

_PASSING = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}


@contextlib.contextmanager
def one_line(folder: AnyPath) -> Iterator[None]:
    """Turn errors of the disk or the store, while a checkpoint is written, into InputError."""
    try:
        with reached(folder):
            yield
    except InputError:
        raise
    except Exception as error:
        if (code := _code(error)) is None:
            raise
        raise InputError(
            f"cannot write a checkpoint to {folder}: {os.strerror(code).lower()}; older "
            "checkpoints are untouched; free space or give another --workdir"
        ) from None


def reached(folder: AnyPath) -> contextlib.AbstractContextManager[None]:
    """Turn errors of a store into InputError; leave those of a folder of this machine."""
    url = remote.url_of(folder)
    return remote.told(url) if url else contextlib.nullcontext()


def says_nothing_of_files(error: Exception) -> bool:
    """Return whether a read failed for reasons outside the files, and may work another time."""
    return isinstance(error, MemoryError) or _code(error) in _PASSING


def _code(error: Exception) -> int | None:
    """Return the system's number of an error; tensorstore only names it in a ValueError's text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


@functools.cache
def tell_once() -> None:
    """Hide the tracebacks that orbax prints of errors that it also raises.

    Each thread that a failed read or write passes through logs it again. So do the futures and
    coroutines that it leaves half done, and tensorstore's own threads, up to the end of the
    process. So these hooks stay. They drop nothing else.
    """
    logging.get_absl_logger().addFilter(_is_news)
    python_logging.getLogger("asyncio").addFilter(_is_news)

    def unraisable(event: UnraisableHookArgs) -> None:
        coroutine = getattr(event.object, "cr_code", None)
        if not (coroutine and _is_orbax(coroutine.co_filename)) and not _is_late(event.exc_value):
            before(event)

    before, sys.unraisablehook = sys.unraisablehook, unraisable


def _is_orbax(path: str) -> bool:
    return f"{os.sep}orbax{os.sep}" in path


def _files(error: BaseException | None) -> Iterator[str]:
    trace = error.__traceback__ if error else None
    while trace:
        yield trace.tb_frame.f_code.co_filename
        trace = trace.tb_next


def _is_news(record: python_logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not (
        _is_orbax(record.pathname)
        or any(_is_orbax(path) for path in _files(error))
        # tensorstore's: a future of it has no traceback
        or any(mark in str(error) for mark in ("os_error_code=", "tensorstore_spec="))
    )


def _is_late(error: BaseException | None) -> bool:
    # A read or write of tensorstore that ends after orbax has given up and closed its loop.
    return (
        isinstance(error, RuntimeError)
        and str(error) == "Event loop is closed"
        and all("asyncio" in path for path in _files(error))
    )
