"""Checkpoints of a run: written in the background, restored onto any mesh, checked when read.

    W/checkpoints/<step>/state      the TrainState as one flat dict of dotted names (orbax)
    W/checkpoints/<step>/metrics    JSON: step, config digest, held-out metrics, checksums

A folder is renamed to <step> when all of it is written. In gs://, where nothing is renamed, orbax
marks it instead. So what a killed run leaves behind never counts as a checkpoint. Nothing is
pickled.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsFloat, TypeVar

import jax
import numpy as np
from absl import logging
from jaxtyping import Shaped

from r0_jax.errors import InputError
from r0_jax.files import write_bytes
from r0_jax.method.train_state import TrainState
from r0_jax.parallel import checksum, distributed
from r0_jax.weights import lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.workdir import orbax_errors, sealed_json
from r0_jax.workdir.workdir import AnyPath, Workdir

T = TypeVar("T")

_STEP = re.compile(r"0|[1-9][0-9]*")
_NONE = "no checkpoint in {} can be read: restore one from a copy, or give another --workdir"
_GROUP_BYTES = 128 * 2**20  # read at once where arrays are read one after the other


class DamagedError(Exception):
    """A checkpoint that cannot be read, or is not what was written."""


class Checkpoints:
    """The checkpoints of a run that is training: the newest `keep`, and the best one.

    Best is the highest `best_metric` among those that it was measured of. One run at a time uses
    it, as a context manager or with `close()`: both wait for the save in progress. Readers of a run
    that may still be training use `load_params`.
    """

    def __init__(
        self,
        workdir: Workdir,
        keep: int = 3,
        best_metric: str | None = None,
        config_digest: str = "",
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        orbax_errors.tell_once()
        self._workdir, self.folder = workdir, workdir.checkpoints
        self._best_metric, self._digest = best_metric, config_digest
        distributed.of_first(self._set_aside_unreadable)
        best = checkpoint_managers.BestN(get_metric_fn=_score, n=1)
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            best_fn=_score,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(keep), best]
            ),
            # Otherwise a thread waits for a folder that cannot be made: the error comes late and
            # the process does not end.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                barrier_sync_fn=distributed.barrier if jax.process_count() > 1 else None,
            ),
        )
        with orbax_errors.one_line(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState) -> bool:
        """Start to write `state`; return False if its step is there already.

        Returns when the arrays are copied off the devices, so that they may be donated next.
        Raises InputError when this or the previous save cannot be written; older ones stay.
        """
        import orbax.checkpoint as ocp

        arrays = _flatten(state)
        step = int(state.step)
        # One process looks: the others may see a shared folder as it was a moment ago.
        if distributed.of_first(lambda: step in self._manager.all_steps()):
            return False
        metadata = sealed_json.seal(
            {
                "step": step,
                "config_digest": self._digest,
                "metrics": {},
                "score": None,
                "checksums": checksum.of_fields(arrays),
            }
        )
        self._workdir.push()  # metrics are there before their checkpoint
        with orbax_errors.one_line(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays)),
                metrics=metadata,
                force=True,  # this step, whatever orbax thinks of the interval
            )
        self._workdir.push_checkpoint(step)
        return True

    def add_metrics(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Add what was measured of a checkpoint after it was begun; it may then be the best one.

        Waits for the save in progress. All processes call it.
        """
        self.wait()
        self._workdir.push()  # the store has the metrics before they count
        metrics = {name: float(value) for name, value in metrics.items()}
        distributed.of_first(functools.partial(self._write_metrics, step, metrics))
        with orbax_errors.one_line(self.folder):
            self._manager.reload()
        self._workdir.push()

    def _write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        folder = self.folder / str(step)
        try:
            metadata = _read_metadata(folder)
        except DamagedError as error:  # since it was written
            raise InputError(_damaged(folder, str(error))) from None
        value = metrics.get(self._best_metric, math.nan)
        metadata["metrics"] = {n: x if math.isfinite(x) else None for n, x in metrics.items()}
        metadata["score"] = value if math.isfinite(value) else None
        path, text = _metadata_file(folder), json.dumps(sealed_json.seal(metadata))
        if isinstance(path, Path):
            write_bytes(path, text.encode())
        else:  # a store's objects are replaced whole
            with orbax_errors.one_line(self.folder):
                path.write_text(text)

    def wait(self) -> None:
        """Return when the save in progress is on disk; raise InputError if it failed."""
        with orbax_errors.one_line(self.folder):
            self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Return the newest step, None if there is none."""
        return self._manager.latest_step()

    def restore(
        self, target: TrainState, step: int | Literal["best"] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the state as `target` (ShapeDtypeStruct with sharding) has it, and its metadata.

        The sharding that it was saved with plays no part. Without `step` it is the newest one
        that can be read: a damaged one is renamed to <step>.damaged, with a warning. Raises
        InputError if the given `step` is damaged, if there is no checkpoint, and for names, shapes
        or dtypes that do not fit.
        """
        if step is not None:
            return _restore(self.folder, find_step(self._workdir, step), target)
        for newest in reversed(distributed.of_first(lambda: steps(self._workdir))):
            folder = self.folder / str(newest)
            try:
                return _read_state(folder, target)
            except DamagedError as error:
                damage = str(error)  # Python unsets `error` below
            distributed.of_first(functools.partial(_set_aside, folder, damage))
            self._manager.reload()
        raise InputError(_NONE.format(self.folder))

    def _set_aside_unreadable(self) -> None:
        for step in steps(self._workdir):  # orbax would fail at metadata that is not JSON
            try:
                read_metadata(self._workdir, step)
            except DamagedError as error:
                _set_aside(self.folder / str(step), str(error))

    def close(self) -> None:
        """Wait for the save in progress; raise InputError if it failed. It may be called again."""
        with orbax_errors.one_line(self.folder):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except InputError as failed:
            if error is None:
                raise
            if not isinstance(error, InputError):  # else it says the same, or matters more
                logging.warning("%s", failed)


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
        raise InputError(_NONE.format(folder))
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
    """Return {step: held-out metric} of the checkpoints that it was measured of."""
    found = {step: _metadata_or_nothing(workdir, step).get("score") for step in steps(workdir)}
    return {step: score for step, score in found.items() if score is not None}


def read_metadata(workdir: Workdir, step: int) -> dict[str, Any]:
    """Return {"step", "config_digest", "metrics": {name: value or None}, ...} of a checkpoint.

    Raises DamagedError.
    """
    return _read_metadata(workdir.checkpoints / str(step))


def _read_metadata(folder: AnyPath) -> dict[str, Any]:
    path = _metadata_file(folder)
    try:
        metadata = sealed_json.loads(path.read_text(encoding="utf-8"))
        if not {"step", "config_digest", "metrics", "score", "checksums"} <= metadata.keys():
            raise ValueError("fields are missing")
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        ValueError,
        RecursionError,
    ) as error:
        raise DamagedError(f"{path}: {error}") from None
    return metadata


def _metadata_file(folder: AnyPath) -> AnyPath:
    return folder / "metrics" / "metrics"


def load_params(
    workdir: Workdir,
    field: Literal["ema_params", "params"] = "ema_params",
    step: int | Literal["best"] | None = None,
) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, Any]]:
    """Return all that `open_params` opens, on the host."""
    params, metadata = open_params(workdir, field, step)
    return {name: np.asarray(x) for name, x in params.items()}, metadata


def open_params(
    workdir: Workdir,
    field: Literal["ema_params", "params"] = "ema_params",
    step: int | Literal["best"] | None = None,
) -> tuple[dict[str, Lazy], dict[str, Any]]:
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
            name: x for name, x in _stored_shapes(folder).items() if name.startswith(field + ".")
        }
        reader = _Reader(folder, stored)
        _verify(checksum.of_fields(reader), metadata)
    except DamagedError as error:
        raise InputError(_damaged(folder, str(error)) + "; name another step") from None

    def leaf(name: str) -> Lazy:
        def value() -> np.ndarray:
            try:
                return reader[name]
            except DamagedError as error:  # since it was checked
                raise InputError(_damaged(folder, str(error)) + "; name another step") from None

        return lazy.computed(stored[name].shape, stored[name].dtype, value)

    return {name.removeprefix(field + "."): leaf(name) for name in reader}, metadata


class _Reader(Mapping[str, np.ndarray]):
    """Some arrays of a checkpoint, in the order of their names.

    Looking one up reads its group, since each call of orbax opens all indices. It raises
    DamagedError.
    """

    def __init__(self, folder: AnyPath, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        self._folder = folder
        self._group_of: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        self._held: dict[str, np.ndarray] = {}
        group, size = {}, 0
        for name in sorted(shapes):
            size += shapes[name].size * shapes[name].dtype.itemsize
            if size > _GROUP_BYTES:
                group, size = {}, shapes[name].size * shapes[name].dtype.itemsize
            group[name] = shapes[name]
            self._group_of[name] = group

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._held:
            self._held = {}
            self._held = _read(self._folder, self._group_of[name])
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group_of)

    def __len__(self) -> int:
        return len(self._group_of)


def _flatten(state: TrainState) -> dict[str, Any]:
    # "params.conv_in.kernel", "opt_state.1.0.mu.conv_in.kernel", "step": without optax's classes.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _score(metadata: Mapping[str, Any]) -> float:
    return -math.inf if metadata["score"] is None else metadata["score"]


def _metadata_or_nothing(workdir: Workdir, step: int) -> dict[str, Any]:
    try:
        return read_metadata(workdir, step)
    except DamagedError:
        return {}


def _restore(folder: AnyPath, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
    try:
        return _read_state(folder / str(step), target)
    except DamagedError as error:
        raise InputError(_damaged(folder / str(step), str(error)) + "; name another step") from None


def _read_state(folder: AnyPath, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
    arrays, metadata = _agreed(lambda: _read_fitting(folder, target))
    _agreed(lambda: _verify(checksum.of_fields(arrays), metadata))
    leaves = [arrays[name] for name in _flatten(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), metadata


def _agreed(read: Callable[[], T]) -> T:
    """Return what `read` returns; raise DamagedError in all processes if it does in any.

    What comes next they do together.
    """
    found, damage = None, None
    try:
        found = read()
    except DamagedError as error:
        damage = str(error)
    if told := [said for said in distributed.of_all(damage) if said is not None]:
        raise DamagedError(told[0])
    return found


def _read_fitting(folder: AnyPath, target: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    wanted = _flatten(target)
    if any(x.sharding is None for x in wanted.values()):
        raise ValueError("every leaf of the target needs a sharding")  # or orbax takes the file's
    metadata = _read_metadata(folder)
    stored = _stored_shapes(folder)
    differs = [
        f"{name} is {_describe(stored.get(name))} there and {_describe(wanted.get(name))} here"
        for name in sorted(stored.keys() | wanted.keys())
        if _describe(stored.get(name)) != _describe(wanted.get(name))
    ]
    if differs:
        more = f" (and {len(differs) - 1} more)" if differs[1:] else ""
        raise InputError(
            f"checkpoint {folder} does not fit this config: {differs[0]}{more}; "
            "use the config it was made with or give another --workdir"
        )
    return _read(folder, wanted), metadata


def _describe(array: jax.ShapeDtypeStruct | None) -> str:
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"


def _stored_shapes(folder: AnyPath) -> dict[str, jax.ShapeDtypeStruct]:
    import orbax.checkpoint as ocp

    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree.items()}
    except Exception as error:  # whatever orbax trips over
        raise _unreadable(folder, error) from None


def _read(folder: AnyPath, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
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
            return handler.restore(folder / "state", args=args)
    except jax.errors.JaxRuntimeError:  # out of memory, say: the file may be whole
        raise
    except Exception as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: AnyPath, error: Exception) -> Exception:
    said = f"{type(error).__name__}: {error}"
    if isinstance(folder, Path) and not orbax_errors.says_nothing_of_files(error):
        return DamagedError(said)
    # A store has objects whole or not at all, so it is the network: no checkpoint is set aside.
    return InputError(
        f"checkpoint {folder} cannot be read ({said.splitlines()[0][:200]}): try "
        "again, or remove it to resume from the one before"
    )


def _verify(checksums: Mapping[str, int], metadata: Mapping[str, Any]) -> None:
    for field, found in checksums.items():
        if found != metadata["checksums"].get(field):
            raise DamagedError(f"its {field} are not what was written (checksums differ)")


def _damaged(folder: AnyPath, damage: str) -> str:
    return f"checkpoint {folder} is damaged ({damage.splitlines()[0][:200]})"


def _set_aside(folder: AnyPath, damage: str) -> None:
    aside = folder.with_name(folder.name + ".damaged")
    while aside.exists():
        aside = aside.with_name(aside.name + "~")
    try:
        folder.rename(aside)
    except OSError as failed:
        raise InputError(
            f"{_damaged(folder, damage)} and cannot be moved away: {failed.strerror}"
        ) from None
    logging.warning(
        "%s; it is renamed to %s, and the newest of the others is used",
        _damaged(folder, damage),
        aside,
    )
