"""Writes files completely or not at all, and reads JSON with readable errors."""

import json
import os
from pathlib import Path

from r0_jax.errors import InputError

Json = dict[str, object]  # an object of a JSON file

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
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError:  # the reader of the file has a message for it
        return
    if start == _LFS:
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
        )


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file completely or not at all; make its folder.

    Raise InputError if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; free space or choose another folder."
        ) from error


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


def read_json(path: str | Path) -> Json:
    """Read the object in a JSON file; raise InputError if it is missing or invalid."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: is the folder complete?") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a JSON file: is the folder complete?") from None
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or very deep nesting
        check_not_pointer(path)
        raise InputError(f"{path} is not valid JSON ({e}): download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value
