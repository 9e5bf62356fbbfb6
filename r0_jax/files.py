"""Writes files completely or not at all, and reads files of others with readable errors."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from r0_jax.errors import InputError

Json = dict[str, object]  # an object of a JSON file

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of what is written, not of what is read
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_LFS = b"version https://git-lfs.github.com/spec/"
A_PICKLE = "a pickle, which is never read, since reading it can run any program"


def is_temporary(name: str) -> bool:
    """Return whether a name is that of an unfinished file of `write_bytes`."""
    return name.startswith(".") and name.endswith(".tmp")


def is_pickle(path: str | os.PathLike) -> bool:
    """Return whether a file's name is that of pickled weights, which are never read."""
    return os.fspath(path).endswith(_PICKLED)


def pickles(folder: Path) -> list[Path]:
    """Return the pickled weights in a folder, in the order of their names."""
    return sorted(filter(is_pickle, folder.glob("*.*")))


def check_not_pointer(path: str | os.PathLike) -> None:
    """Raise InputError if a file is a Git LFS pointer; say nothing of a file that is not there."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError:  # the reader of the file has a message for it
        return
    if start == _LFS:
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
        )


def is_plain_name(name: str) -> bool:
    """Return whether a text is the name of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


def check_link(path: Path, folder: Path) -> None:
    """Check that a path in a downloaded folder leads inside it, after all links.

    The cache of the Hugging Face Hub is the exception: there, a file of a snapshot is a link to a
    blob of the same model. Raise InputError for other links, so that no other file is copied.
    """
    target, inside = path.resolve(), [folder.resolve()]
    for parent in inside[0].parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            inside.append(parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in inside):
        raise InputError(
            f"{path} is a link that leads out of {folder}: replace it by a copy of its target, "
            "if you trust the folder"
        )


def copy_file(path: Path, target: Path, folder: Path) -> None:
    """Copy a file of a downloaded folder; raise InputError for a link that leads out of it."""
    check_link(path, folder)
    check_regular(path)
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        if error.errno in FULL:  # the copy is what is not written
            raise OSError(error.errno, error.strerror, os.fspath(target)) from None
        raise


def check_regular(path: str | os.PathLike) -> None:
    """Raise InputError for a pipe, a socket or a device, which may block or never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens the file says what is wrong
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a pipe or a device, not a file: give a regular file")


def temporary_name(path: Path, ending: str = "tmp") -> Path:
    """Return a hidden path beside another one, with a name that nobody can guess."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{ending}")


@contextlib.contextmanager
def building(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` to build in, which is renamed to `path` when it is whole.

    Removes the folder at the end, and first what killed processes have left of the same name. A
    full disk is an error of `path`.
    """
    try:
        folder = begin(path)
        folder.mkdir(parents=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write to {path.parent}: {reason}; choose another --out") from None
    try:
        with holding(folder):
            yield folder
    except OSError as error:
        if error.errno in FULL:
            reason = (error.strerror or str(error)).lower()
            raise InputError(
                f"cannot write {path}: {reason}; free some space or choose another folder"
            ) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def begin(path: Path) -> Path:
    """Return a new temporary name for `path`; remove those that no living process holds."""
    name = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if name.fullmatch(left.name):
            with contextlib.suppress(OSError), holding(left, new=False):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return temporary_name(path)


@contextlib.contextmanager
def holding(path: Path, new: bool = True) -> Iterator[None]:
    """Keep other processes from removing an unfinished file or folder.

    The end of the process lets go of it. Where a file system has no locks nothing is held; and an
    old one (`new` false), which may be another process's, is then an OSError.
    """
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with contextlib.suppress(*([OSError] if new else [])):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file completely or not at all; make its folder.

    Raise InputError if the disk is full or the folder cannot be written.
    """
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that is written completely or not at all, as `write_bytes` does."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:  # never an existing file or link
            yield file
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; free space or choose another folder."
        ) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """Check that an output folder exists or can be made, and is writable; write nothing.

    Raise InputError if not. Call this before long work.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"cannot write to {folder}: {there} is not a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"cannot write to {folder}: {there} is not writable; change its "
            "permissions or choose another one"
        )


def loads(text: str | bytes) -> object:
    """Return the value of JSON; raise ValueError, also for JSON that Python cannot hold."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def kind_of(value: object) -> str:
    """Return the kind of a JSON value, for messages: "list", "int", "null"."""
    return "null" if value is None else type(value).__name__


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Let every InputError inside name the file that it is about."""
    try:
        yield
    except InputError as error:
        if os.fspath(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None


def read_json(path: str | Path) -> Json:
    """Read the object in a JSON file; raise InputError if it is missing or invalid."""
    path = Path(path)
    check_regular(path)
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: is the folder complete?") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a JSON file: is the folder complete?") from None
    except ValueError as e:  # not JSON, or not UTF-8
        check_not_pointer(path)
        raise InputError(f"{path} is not valid JSON ({e}): download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {kind_of(value)}")
    return value
