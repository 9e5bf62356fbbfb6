"""Checkpoints of a run, as any process finds and reads them; each is checked when it is read.

    W/checkpoints/<step>/state      the TrainState as one flat dict of dotted names (orbax)
    W/checkpoints/<step>/metrics    JSON: step, config digest, held-out metrics, checksums

A folder is renamed to <step> when all of it is written. In gs://, where nothing is renamed, orbax
marks it instead. So what a killed run leaves behind never counts as a checkpoint. Nothing is
pickled.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypedDict, cast

import jax
import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from r0_jax import machine
from r0_jax.errors import InputError
from r0_jax.files import check_regular
from r0_jax.parallel import checksum
from r0_jax.weights import lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.workdir import orbax_errors, orbax_path, sealed_json
from r0_jax.workdir.workdir import AnyPath, Workdir

_STEP = re.compile(r"0|[1-9][0-9]*")
NO_READABLE = "no checkpoint in {} can be read: restore one from a copy, or give another --workdir"
_GROUP_BYTES = 128 * 2**20  # read at once where arrays are read one after the other

Leaf = jax.Array | jax.ShapeDtypeStruct  # what is to be read, and where it is to live


class DamagedError(Exception):
    """A checkpoint that cannot be read, or is not what was written."""


class Metadata(TypedDict):
    """Facts that are stored beside the arrays of a checkpoint.

    Attributes:
      metrics: what an evaluation measured; None is not a finite number.
      score: the held-out metric, of which the best checkpoint has the highest.
      checksums: of each field of the TrainState.
    """

    step: int
    config_digest: str
    metrics: dict[str, float | None]
    score: float | None
    checksums: dict[str, int]


def steps(workdir: Workdir) -> list[int]:
    """Return the steps of a workdir's checkpoints, in order; ignore whatever else lies there."""
    import orbax.checkpoint as ocp

    folder = workdir.checkpoints
    with orbax_errors.reached(folder):
        there = folder.iterdir() if folder.is_dir() else ()
        return sorted(
            int(path.name)
            for path in there
            if _STEP.fullmatch(path.name)
            and path.is_dir()
            and (isinstance(path, Path) or ocp.utils.is_checkpoint_finalized(path))
        )


def is_begun(workdir: Workdir) -> bool:
    """Return whether a run has left checkpoints there; raise InputError if all are damaged."""
    if steps(workdir):
        return True
    folder = workdir.checkpoints
    if folder.is_dir() and any(".damaged" in path.name for path in folder.iterdir()):
        raise InputError(NO_READABLE.format(folder))
    return False


def find_step(workdir: Workdir, step: int | Literal["best"] | None = None) -> int:
    """Return the step asked for, the newest one by default; raise InputError if there is none."""
    there = steps(workdir)
    if not there:
        raise InputError(f"{workdir.checkpoints} holds no checkpoint; check --workdir")
    if step == "best":
        measured = scores(workdir)
        if not measured:
            raise InputError(
                f"no checkpoint of {workdir.path} was saved with a held-out metric; leave the step "
                "out to take the newest"
            )
        return best(measured)
    if step is not None and step not in there:
        raise InputError(f"{workdir.path} has no checkpoint of step {step}; it has {there}")
    return there[-1] if step is None else step


def best(scores: Mapping[int, float]) -> int:
    """Return the step of the highest score, the last one of equals."""
    return max(scores, key=lambda step: (scores[step], step))


def scores(workdir: Workdir) -> dict[int, float]:
    """Return {step: held-out metric} of the checkpoints that it was measured of.

    Warns of a damaged one, which may be the best.
    """
    found = {}
    for step in steps(workdir):
        try:
            score = read_metadata(workdir, step)["score"]
        except DamagedError as error:
            warnings.warn(
                f"{damage_line(workdir.checkpoints / str(step), str(error))}; the others are used, "
                "though it may be the best",
                stacklevel=3,
            )
            continue
        if score is not None:
            found[step] = score
    return found


def read_metadata(workdir: Workdir, step: int) -> Metadata:
    """Return the metadata of a checkpoint; raise DamagedError."""
    return read_metadata_of(workdir.checkpoints / str(step))


def read_metadata_of(folder: AnyPath) -> Metadata:
    """Return the metadata in a checkpoint's folder; raise DamagedError."""
    path = metadata_file(folder)
    if isinstance(path, Path):
        check_regular(path)
    try:
        metadata = sealed_json.loads(path.read_text(encoding="utf-8"))
        if not {"step", "config_digest", "metrics", "score", "checksums"} <= metadata.keys():
            raise ValueError("fields are missing")
        if _STEP.fullmatch(folder.name) and metadata["step"] != int(folder.name):
            raise ValueError(f"it is the checkpoint of step {metadata['step']}, renamed")
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        ValueError,
        RecursionError,
    ) as error:
        raise DamagedError(f"{path}: {error}") from None
    return cast(Metadata, metadata)  # sealed, so they are what was written


def metadata_file(folder: AnyPath) -> AnyPath:
    """Return the path of the metadata in a checkpoint's folder."""
    return folder / "metrics" / "metrics"


def load_params(
    workdir: Workdir,
    field: Literal["ema_params", "params"] = "ema_params",
    step: int | Literal["best"] | None = None,
) -> tuple[dict[str, Shaped[NDArray, "..."]], Metadata]:
    """Return all that `open_params` opens, on the host."""
    params, metadata = open_params(workdir, field, step)
    return {name: np.asarray(x) for name, x in params.items()}, metadata


def open_params(
    workdir: Workdir,
    field: Literal["ema_params", "params"] = "ema_params",
    step: int | Literal["best"] | None = None,
) -> tuple[dict[str, Lazy], Metadata]:
    """Return one field of a checkpoint, by dotted name in its own dtypes, and the metadata.

    It reads all of the field once, to check it. A leaf is read again when it is asked for, fastest
    in the order of the names; a few tensors are held at a time. It reads nothing else and writes
    nothing: any machine will do, also while the run is training. Raises InputError where the
    checkpoint is missing or damaged.
    """
    step = find_step(workdir, step)
    workdir.pull_checkpoint(step)
    folder = workdir.checkpoints / str(step)
    try:
        metadata = read_metadata(workdir, step)
        stored = {
            name: x for name, x in stored_shapes(folder).items() if name.startswith(field + ".")
        }
        reader = _Reader(folder, stored)
        verify(checksum.of_fields(reader), metadata)
    except DamagedError as error:
        raise InputError(damage_line(folder, str(error)) + "; name another step") from None

    leaves = {
        name.removeprefix(field + "."): lazy.computed(
            stored[name].shape,
            stored[name].dtype,
            functools.partial(_look_up, reader, name, folder),
        )
        for name in reader
    }
    return leaves, metadata


def _look_up(reader: "_Reader", name: str, folder: AnyPath) -> NDArray:
    try:
        return reader[name]
    except DamagedError as error:  # since it was checked
        raise InputError(damage_line(folder, str(error)) + "; name another step") from None


class _Reader(Mapping[str, NDArray]):
    """Some arrays of a checkpoint, in the order of their names.

    Looking one up reads its group, since each call of orbax opens all indices. It raises
    DamagedError.
    """

    def __init__(self, folder: AnyPath, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        self._folder = folder
        self._group_of: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        self._held: dict[str, NDArray] = {}
        group: dict[str, jax.ShapeDtypeStruct] = {}
        size = 0
        for name in sorted(shapes):
            size += shapes[name].size * shapes[name].dtype.itemsize
            if size > _GROUP_BYTES:
                group, size = {}, shapes[name].size * shapes[name].dtype.itemsize
            group[name] = shapes[name]
            self._group_of[name] = group

    def __getitem__(self, name: str) -> NDArray:
        if name not in self._held:
            self._held = {}
            read = read_arrays(self._folder, self._group_of[name])
            self._held = {name: np.asarray(x) for name, x in read.items()}
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group_of)

    def __len__(self) -> int:
        return len(self._group_of)


def stored_shapes(folder: AnyPath) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of every array of a checkpoint; raise DamagedError."""
    import orbax.checkpoint as ocp

    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(orbax_path.of(folder / "state")).tree
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree.items()}
    except Exception as error:  # whatever orbax trips over
        raise _unreadable(folder, error) from None


def read_arrays(folder: AnyPath, targets: Mapping[str, Leaf]) -> dict[str, jax.Array | NDArray]:
    """Read jax Arrays where a target has a sharding, numpy arrays where it has none."""
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeRestore(
        item=targets,
        restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
        partial_restore=True,
    )
    orbax_errors.tell_once()
    try:
        # Not by a Checkpointer, in which all processes wait for each other.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.restore(orbax_path.of(folder / "state"), args=args)
    except jax.errors.JaxRuntimeError:  # out of memory, say: the file may be whole
        raise
    except Exception as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: AnyPath, error: Exception) -> Exception:
    if machine.problem(error):  # the files may be whole
        return error
    said = f"{type(error).__name__}: {error}"
    if isinstance(folder, Path) and not orbax_errors.says_nothing_of_files(error):
        return DamagedError(said)
    # A store has objects whole or not at all, so it is the network: no checkpoint is set aside.
    return InputError(
        f"checkpoint {folder} cannot be read ({said.splitlines()[0][:200]}): try "
        "again, or remove it to resume from the one before"
    )


def verify(checksums: Mapping[str, int], metadata: Metadata) -> None:
    """Raise DamagedError if checksums are not those in the metadata."""
    for field, found in checksums.items():
        if found != metadata["checksums"].get(field):
            raise DamagedError(f"its {field} are not what was written (checksums differ)")


def damage_line(folder: AnyPath, damage: str) -> str:
    """Return one line, which says that a checkpoint is damaged and how."""
    return f"checkpoint {folder} is damaged ({damage.splitlines()[0][:200]})"
