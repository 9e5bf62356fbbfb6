"""Files on disk: written whole or not at all, and read as what they should be."""

import json
import os
from pathlib import Path
from typing import Any

from r0_jax.errors import InputError

PICKLED = (".bin", ".ckpt", ".pt", ".pth")  # suffixes of weights that are never read


def is_temporary(name: str) -> bool:
    """Whether a file's name is one under which `write_bytes` has not finished."""
    return name.startswith(".") and name.endswith(".tmp")


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes the whole file or none of it, making its folder; a full disk is an InputError."""
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
    """InputError for an output folder that cannot be made or written to, before the work whose
    results go there; makes nothing."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"cannot write to {folder}: {there} is not a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"cannot write to {folder}: {there} is not writable; change its "
            "permissions or choose another one"
        )


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if it is missing or not a JSON object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: is the folder complete?") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a JSON file: is the folder complete?") from None
    except (ValueError, RecursionError) as e:  # no JSON, no UTF-8, a thousand brackets
        raise InputError(f"{path} is not valid JSON ({e}): download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value
