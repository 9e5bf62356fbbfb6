"""Access to paths in object stores, gs://bucket/... and s3://bucket/...

`local` fetches inputs (weights, prompts, images) into the user's cache folder and returns an
ordinary path. Workdirs are also written; workdir/mirror.py handles them.

The stores are accessed with fsspec through etils, as in orbax. This needs gcsfs or s3fs, which
users install. They find credentials as the vendors' tools do.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import jax
from etils import epath
from etils.epath import backend
from rich.filesize import decimal

from r0_jax.console import console
from r0_jax.errors import InputError, UnreachableError
from r0_jax.files import begin, check_writable, is_pickle

os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise etils imports TensorFlow if present

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> package to install
_THREADS = 8  # files moved at once
_TOLD_FROM = 10**7  # bytes; a smaller fetch prints nothing
_NOT_OURS = (".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite", ".xml")

# Size, and time of change in microseconds. Files with equal stamps are the same, as in rsync.
Stamp: TypeAlias = tuple[int, int]


def url_of(path: str | os.PathLike) -> str | None:
    """Return the URL of a path in an object store, without a final slash; None for a local path.

    Accept a URL that pathlib has shortened to "gs:/bucket". Raise InputError for other schemes.
    """
    text = os.fspath(path)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text, re.DOTALL)
    if not found or (found[1] not in PACKAGES and "://" not in text):
        return None
    if found[1] not in PACKAGES:
        raise InputError(
            f"{text}: {found[1]}:// is not supported; use gs://, s3:// or a path on this machine"
        )
    if not (rest := found[2].strip("/")):
        raise InputError(f"{text} does not name a bucket: give {found[1]}://bucket/path")
    return f"{found[1]}://{rest}"


def output(path: str | os.PathLike) -> Path:
    """Return a local output path; raise InputError for a path in an object store."""
    if url := url_of(path):
        raise InputError(
            f"{url}: writing to an object store is not supported here; give a path on this "
            "machine, and copy the result"
        )
    return Path(path)


def orbax_reaches(url: str) -> bool:
    """Return whether orbax itself reads and writes a URL; it supports only gs://."""
    return url.startswith("gs://")


# --- reading -------------------------------------------------------------------------------------


def local(path: str | os.PathLike) -> Path:
    """Return a local file or folder: the path itself, or a copy fetched from an object store.

    Keep cached files whose size and time equal the store's; never use an unfinished file.
    Raise InputError if the URL does not exist or cannot be reached.
    """
    url = url_of(path)
    return Path(path) if url is None else _fetched(url)


def has_file(folder: str | os.PathLike, name: str) -> bool:
    """Return whether a folder, local or in an object store, has a file; fetch nothing."""
    url = url_of(folder)
    return Path(folder, name).is_file() if url is None else "" in list_files(f"{url}/{name}")


@functools.cache
def _fetched(url: str) -> Path:
    there = list_files(url)
    if not there:
        raise InputError(f"{url}: no such object or folder")
    target = cache() / "fetched" / url.replace("://", "/", 1)
    with locked(target.with_name(f".{target.name}.lock")):  # one process per machine fetches
        remove_others(target, there)
        fetch(url, _wanted(there), target)
    return target


def _wanted(there: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """Return a folder's files without large files that are never read.

    These are other formats, pickles beside safetensors, and single-file checkpoints beside the
    parts of a pipeline.
    """
    whole = {os.path.dirname(name) for name in there if name.endswith(".safetensors")}
    return {
        name: stamp
        for name, stamp in there.items()
        if not (
            name.endswith(_NOT_OURS)
            or (is_pickle(name) and os.path.dirname(name) in whole)
            or (
                "model_index.json" in there
                and "/" not in name
                and (name.endswith(".safetensors") or is_pickle(name))
            )
        )
    }


def fetch(url: str, wanted: Mapping[str, Stamp], target: Path) -> None:
    """Fetch the `wanted` files below `url` into `target`; the name "" means the file `url`."""
    missing = {name: x for name, x in wanted.items() if stamp_of(target / name) != x}
    size = sum(size for size, _ in missing.values())
    if size > _TOLD_FROM:
        console.print(f"fetching {url}: {len(missing)} files, {decimal(size)}", highlight=False)

    def get(name: str) -> None:
        path, (size, changed) = target / name, missing[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = begin(path)
        store(url).get_file(below(url, name), str(part))
        if part.stat().st_size != size:
            raise InputError(f"{below(url, name)} changed while it was fetched: try again")
        os.utime(part, ns=(changed * 1000, changed * 1000))
        os.replace(part, path)

    with told(url):
        in_parallel(get, missing)


def remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Remove empty folders and all files, except for `kept` and hidden files."""
    kept = set(kept)
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif name not in kept and not any(part.startswith(".") for part in name.split("/")):
            path.unlink()


# --- the store -----------------------------------------------------------------------------------


def store(url: str) -> fsspec.AbstractFileSystem:
    """Return the file system of a URL; call this and its methods inside `told`."""
    return backend.fsspec_backend.fs(url)


def folder(url: str) -> epath.Path:
    """Return a folder of the store as an etils path, without stale listings."""
    with told(url):
        store(url).invalidate_cache()  # fsspec does not see tensorstore's writes
    return epath.Path(url)


def list_files(url: str) -> dict[str, Stamp]:
    """Return {name below `url`: stamp} of all files.

    For a file, return {"": stamp}; for a URL that does not exist, {}.
    """
    with told(url):
        store(url).invalidate_cache()
        found = store(url).find(url, detail=True)
        root = store(url)._strip_protocol(url)
    named = {
        path.removeprefix(root): info
        for path, info in found.items()
        if path == root or path.startswith(f"{root}/")
    }
    return {
        name.strip("/"): (int(info["size"]), _changed(info))
        for name, info in named.items()
        if not name.endswith("/") and ".." not in name.split("/")
    }


def _changed(info: Mapping[str, Any]) -> int:
    """Return the time of change in microseconds; each store has its own name for it."""
    when = next(info[name] for name in ("mtime", "LastModified", "created") if name in info)
    when = when.timestamp() if isinstance(when, datetime.datetime) else float(when)
    return round(when * 10**6)


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a local file; None if it does not exist."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, round(found.st_mtime_ns / 1000)


def below(url: str, name: str) -> str:
    """Return the URL of a name from `list_files`."""
    return f"{url}/{name}" if name else url


def in_parallel(do: Callable[[str], None], names: Iterable[str]) -> None:
    """Call `do` for several names at once; raise the first error after all others have ended."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(do, sorted(names)):
            pass


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turn the errors of the stores' packages into one-line InputErrors."""
    try:
        yield
    except (InputError, jax.errors.JaxRuntimeError):  # the latter comes from other processes
        raise
    except ImportError as error:
        scheme = url.split(":")[0]
        needed = "google-cloud-storage" if "google" in str(error) else PACKAGES[scheme]
        raise InputError(
            f"{url}: {scheme}:// needs a package that is not installed: pip install {needed}"
        ) from None
    except Exception as error:  # botocore, google.auth and aiohttp share no base class
        if isinstance(error, OSError) and error.filename and Path(error.filename).is_absolute():
            raise  # an error of the local disk
        raise _refusal(url, error) from None


def _refusal(url: str, error: Exception) -> InputError:
    kind, text = type(error).__name__, (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, FileNotFoundError):
        return InputError(f"{url}: there is no such bucket or object ({text})")
    if re.search("credential|anonymous|401|unauthorized|token", f"{kind} {text}", re.IGNORECASE):
        advice = (
            "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
            if url.startswith("gs://")
            else "aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        return InputError(f"{url}: no valid credentials ({text}): {advice}")
    if isinstance(error, PermissionError) or re.search("forbidden|403|denied", text, re.IGNORECASE):
        return InputError(f"{url}: access is denied ({text})")
    return UnreachableError(f"{url} cannot be reached ({kind}: {text})")


# --- this machine --------------------------------------------------------------------------------


def cache() -> Path:
    """Return r0_jax's folder in the user's cache, or a private one where that is not writable.

    An empty or relative XDG_CACHE_HOME counts as not set.
    """
    parent = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    if not os.path.isabs(parent):
        parent = os.path.expanduser("~/.cache")
    if not os.path.isabs(parent):  # the user has no home, as in some containers
        return _temporary_cache("there is no home folder")
    folder = Path(parent, "r0_jax")
    try:
        check_writable(folder)
    except InputError:
        return _temporary_cache(f"{folder} is not writable")
    return folder


def _temporary_cache(reason: str) -> Path:
    """Return a private folder for temporary files; others could write programs to a shared one."""
    folder = Path(tempfile.gettempdir(), f"r0_jax-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not of what a link leads to
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError(
            f"{reason}, and {folder} is not a private folder of this user: set XDG_CACHE_HOME to "
            "a folder that can be written"
        )
    warnings.warn(f"{reason}: the cache is in {folder}; XDG_CACHE_HOME moves it", stacklevel=1)
    return folder


@contextlib.contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock among the processes of this machine; the end of a process releases it.

    Wait for the lock. With a message `busy`, raise InputError with it instead of waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(busy) from None
        except OSError:  # a file system without locks
            pass
        yield
