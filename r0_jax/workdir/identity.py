"""A run's folder belongs to one config, config.json: two runs cannot mix."""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax import files, paths
from r0_jax.errors import InputError
from r0_jax.files import Json, check_regular, write_bytes
from r0_jax.parallel import distributed
from r0_jax.workdir import checkpoint, sealed_json
from r0_jax.workdir.workdir import Workdir

# Fields that may change when a run is resumed. They decide how long it trains, how often it writes
# and where it computes, not what it computes. `steps` is one of them only where the learning rate
# does not decay towards it.
HARMLESS = frozenset(
    {
        "steps",
        "checkpoint_every",
        "eval_every",
        "log_every",
        "wandb",
        "tensorboard",
        "profile",
        "workdir",
        "mesh",
        "device_batch",
        "draw_batch",
        "sharding",
        "attention",
        "remat",
        "scan_blocks",
        "keep_checkpoints",
        "max_skipped_in_a_row",
        "early_stop",
        "veto",
        "test",
        "compilation_cache",
        "processes",
    }
)

_SEEN = 60.0  # seconds after which a file of one machine is seen by all others on NFS


def check_same_run(workdir: Workdir, config: ConfigDict) -> str:
    """Write `workdir`/config.json; raise InputError where a run has another config.

    With a checkpoint there, the config may differ in the HARMLESS fields only; the error names
    what differs. Returns the digest of all other fields.
    """
    path = workdir.path / "config.json"
    new = json.loads(json.dumps(config.to_dict()))  # as it comes back: tuples are lists
    here = dict(_fields(new))
    if checkpoint.steps(workdir):
        there = dict(_fields(_read(path)))
        one, other = _one_spelling(here), _one_spelling(there)
        differs = [
            f"{name} is {_show(there, name)} there and {_show(here, name)} here"
            for name in sorted(here.keys() | there.keys())
            if _show(one, name) != _show(other, name) and _matters(name, here)
        ]
        if differs:
            more = f" (and {len(differs) - 3} more)" if len(differs) > 3 else ""
            raise InputError(
                f"{workdir.path} holds a run with another config: {'; '.join(differs[:3])}{more}; "
                "set it back to continue that run, or give another --workdir"
            )
    elif path.exists() and "rewards" not in _read(path):
        raise InputError(f"{path} is not the config of a run: give another --workdir")
    sealed = sealed_json.seal(new)
    write_bytes(path, json.dumps(sealed, indent=1, ensure_ascii=False).encode("utf-8"))
    matters = {k: value for k, value in _one_spelling(here).items() if _matters(k, here)}
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:16]


def check_same_everywhere(config: ConfigDict) -> None:
    """Raise InputError in a process whose config is not that of process 0."""
    here = dict(_fields(json.loads(json.dumps(config.to_dict()))))
    there = dict(_fields(distributed.of_first(config.to_dict)))
    for name in sorted(here.keys() | there.keys()):
        if _show(here, name) != _show(there, name):
            raise InputError(
                f"{name} is {_show(here, name)} in this process and "
                f"{_show(there, name)} in process 0: start all with the same flags"
            )


def check_shared(workdir: Workdir) -> None:
    """Raise InputError in a process that does not see the folder of process 0.

    Each machine has its own mirror of a store, so nothing is checked of a mirror.
    """
    if workdir.is_mirror:
        return
    path = workdir.path / ".shared"

    def write() -> str:
        token = os.urandom(8).hex()
        write_bytes(path, token.encode())
        return token

    token, deadline = distributed.of_first(write), time.monotonic() + _SEEN
    while not (path.is_file() and path.read_bytes() == token.encode()):
        if time.monotonic() > deadline:
            raise InputError(
                f"{workdir.path} is not the folder that process 0 has under this name: "
                "give a --workdir on a file system that all processes share"
            )
        time.sleep(0.2)
    distributed.together()
    distributed.of_first(lambda: path.unlink(missing_ok=True))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, as far as its file system can.

    Raises InputError where another run is training in it. A killed run holds nothing.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / ".lock").open("ab"))
        except OSError as error:
            raise InputError(
                f"--workdir={folder} cannot be written to ({error.strerror}): give another one"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {folder}: wait for it, or give another --workdir"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _read(path: Path) -> Json:
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
        config = files.loads(text)
    except FileNotFoundError:
        reason = "is missing, though there are checkpoints"
    except IsADirectoryError:
        reason = "is a folder"
    except ValueError:
        reason = "is not JSON"
    else:
        if isinstance(config, dict):
            try:
                return sealed_json.loads_any(text)
            except ValueError:
                reason = "is not what the run wrote: it was edited"
        else:
            reason = "is not a JSON object"
    raise InputError(f"{path} {reason}; bring it back, or give another --workdir")


def _fields(config: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from _fields(value, f"{name}.{key}" if name else key)
    else:
        yield name, config


def _one_spelling(fields: Mapping[str, object]) -> Json:
    """Return the fields with equal paths where the files are the same, however they are spelled."""
    return {
        name: paths.real(value) if isinstance(value, str) and base.is_path(name) else value
        for name, value in fields.items()
    }


def _matters(name: str, config: Mapping[str, object]) -> bool:
    if name == "steps" and config.get("optimizer.schedule", "constant") != "constant":
        return True  # the learning rate of every step depends on the last one
    return name.split(".")[0] not in HARMLESS


def _show(config: Mapping[str, object], name: str) -> str:
    return json.dumps(config[name], ensure_ascii=False) if name in config else "absent"
