"""Paths in object stores, gs://bucket/... and s3://bucket/...: the one module that knows of them.

What is only read (weights, prompts, images) is fetched into the user's cache folder by `local` and
is an ordinary path from then on. Workdirs, which are written too, are mirror.py's.

Stores are reached by fsspec through etils, as orbax does it: by gcsfs or s3fs, which are installed
by who needs them, and which find credentials as their vendors' tools do.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import os
import re
import tempfile
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
from r0_jax.files import PICKLED

os.environ.setdefault("EPATH_USE_TF", "false")  # where it is installed, it would be imported

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> what to install
_THREADS = 8  # files moved at once
_TOLD_FROM = 10**7  # bytes: less is fetched in silence
_NOT_OURS = (".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite", ".xml")

# Size, and time of change in microseconds: files are the same where both are, as for rsync.
Stamp: TypeAlias = tuple[int, int]


def url_of(path: str | os.PathLike) -> str | None:
    """What a path names in an object store, without a slash at its end; None for a local path.

    Also of a URL that pathlib has cut to "gs:/bucket". Raises InputError for other schemes.
    """
    text = os.fspath(path)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text, re.DOTALL)
    if not found or (found[1] not in PACKAGES and "://" not in text):
        return None
    if found[1] not in PACKAGES:
        raise InputError(
            f"{text}: {found[1]}:// is not supported; use gs://, s3:// or a path of this machine"
        )
    if not (rest := found[2].strip("/")):
        raise InputError(f"{text} names no bucket: give {found[1]}://bucket/path")
    return f"{found[1]}://{rest}"


def output(path: str | os.PathLike) -> Path:
    """A path to write to; InputError for one in an object store."""
    if url := url_of(path):
        raise InputError(f"{url} is not written to: give a path of this machine and copy it there")
    return Path(path)


def orbax_reaches(url: str) -> bool:
    """Whether orbax reads and writes there by itself: it knows gs:// only."""
    return url.startswith("gs://")


# --- reading -------------------------------------------------------------------------------------


def local(path: str | os.PathLike) -> Path:
    """A file or folder on this machine: the path itself, or what was fetched of an object store.

    Files whose size and time are those of the store stay; one that a kill cut short never counts.
    Raises InputError where there is none or it cannot be reached.
    """
    url = url_of(path)
    return Path(path) if url is None else _fetched(url)


def has_file(folder: str | os.PathLike, name: str) -> bool:
    """Whether the folder, which may be in an object store, has the file; fetches nothing."""
    url = url_of(folder)
    return Path(folder, name).is_file() if url is None else "" in list_files(f"{url}/{name}")


@functools.cache
def _fetched(url: str) -> Path:
    there = list_files(url)
    if not there:
        raise InputError(f"{url}: no such object or folder")
    target = cache() / "fetched" / url.replace("://", "/", 1)
    with locked(target.with_name(f".{target.name}.lock")):  # one process of a machine fetches
        remove_others(target, there)
        fetch(url, _wanted(there), target)
    return target


def _wanted(there: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """A folder's files without gigabytes that are never read: other formats, pickles beside
    safetensors, and single-file checkpoints beside a pipeline's parts."""
    whole = {os.path.dirname(name) for name in there if name.endswith(".safetensors")}
    return {
        name: stamp
        for name, stamp in there.items()
        if not (
            name.endswith(_NOT_OURS)
            or (name.endswith(PICKLED) and os.path.dirname(name) in whole)
            or (
                "model_index.json" in there
                and "/" not in name
                and name.endswith((".safetensors", *PICKLED))
            )
        )
    }


def fetch(url: str, wanted: Mapping[str, Stamp], target: Path) -> None:
    """Makes `target` hold these files, by their names below `url`; "" is `url` itself, a file."""
    missing = {name: x for name, x in wanted.items() if stamp_of(target / name) != x}
    size = sum(size for size, _ in missing.values())
    if size > _TOLD_FROM:
        console.print(f"fetching {url}: {len(missing)} files, {decimal(size)}", highlight=False)

    def get(name: str) -> None:
        path, (size, changed) = target / name, missing[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        store(url).get_file(below(url, name), str(part))
        if part.stat().st_size != size:
            raise InputError(f"{below(url, name)} changed while it was fetched: try again")
        os.utime(part, ns=(changed * 1000, changed * 1000))
        os.replace(part, path)

    with told(url):
        in_parallel(get, missing)


def remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Removes all files but the `kept` and hidden ones, and empty folders."""
    kept = set(kept)
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif name not in kept and not any(part.startswith(".") for part in name.split("/")):
            path.unlink()


# --- the store -----------------------------------------------------------------------------------


def store(url: str) -> fsspec.AbstractFileSystem:
    """Call it and its methods inside of `told`."""
    return backend.fsspec_backend.fs(url)


def folder(url: str) -> epath.Path:
    """A folder of the store for who can handle one, as it is now."""
    with told(url):
        store(url).invalidate_cache()  # tensorstore writes behind its back
    return epath.Path(url)


def list_files(url: str) -> dict[str, Stamp]:
    """{name below `url`: stamp} of all files; {"": stamp} where it is a file, {} for nothing."""
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
    """Microseconds, by whatever name the store calls them."""
    when = next(info[name] for name in ("mtime", "LastModified", "created") if name in info)
    when = when.timestamp() if isinstance(when, datetime.datetime) else float(when)
    return round(when * 10**6)


def stamp_of(path: Path) -> Stamp | None:
    """Of a file of this machine; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, round(found.st_mtime_ns / 1000)


def below(url: str, name: str) -> str:
    """The URL of a name of `list_files`."""
    return f"{url}/{name}" if name else url


def in_parallel(do: Callable[[str], None], names: Iterable[str]) -> None:
    """Moves several files at once; the first error is raised when the others have ended."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(do, sorted(names)):
            pass


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turns what the packages of stores raise into one line."""
    try:
        yield
    except (InputError, jax.errors.JaxRuntimeError):  # the latter of other processes
        raise
    except ImportError as error:
        scheme = url.split(":")[0]
        needed = "google-cloud-storage" if "google" in str(error) else PACKAGES[scheme]
        raise InputError(
            f"{url}: {scheme}:// needs a package that is not installed: pip install {needed}"
        ) from None
    except Exception as error:  # botocore's, google.auth's and aiohttp's have no common base
        if isinstance(error, OSError) and error.filename and Path(error.filename).is_absolute():
            raise  # of this machine's disk
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
    """r0_jax's folder in the user's cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "r0_jax").expanduser()
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir(), "r0_jax")


@contextlib.contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Waits for other processes of this machine, or, where there is something to say of who is
    `busy`, refuses at once with it; a killed process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(busy) from None
        except OSError:  # a file system without locks
            pass
        yield
