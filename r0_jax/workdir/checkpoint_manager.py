"""The checkpoints of a run that is training: written in the background, restored onto any mesh."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, SupportsFloat, TypeVar

import jax
from absl import logging
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.files import write_bytes
from r0_jax.method.train_state import TrainState
from r0_jax.parallel import checksum, distributed
from r0_jax.workdir import checkpoint, orbax_errors, orbax_path, sealed_json
from r0_jax.workdir.checkpoint import Leaf, Metadata
from r0_jax.workdir.workdir import AnyPath, Workdir

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run that is training: the newest `keep`, and the best one.

    Best is the one of the highest score, of those that have one. One run at a time uses it, as a
    context manager or with `close()`: both wait for the save in progress. Readers of a run that may
    still be training use `checkpoint.load_params`.
    """

    def __init__(
        self,
        workdir: Workdir,
        keep: int = 3,
        config_digest: str = "",
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        orbax_errors.tell_once()
        self._workdir, self.folder = workdir, workdir.checkpoints
        self._digest = config_digest
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
            self._manager = ocp.CheckpointManager(orbax_path.of(self.folder), options=options)

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

    def add_metrics(
        self, step: int, metrics: Mapping[str, SupportsFloat], score: float = math.nan
    ) -> None:
        """Add what was measured of a checkpoint after it was begun.

        With a `score` that is not NaN it may then be the best one. Waits for the save in progress.
        All processes call it.
        """
        self.wait()
        self._workdir.push()  # the store has the metrics before they count
        values = {name: float(value) for name, value in metrics.items()}
        distributed.of_first(functools.partial(self._write_metrics, step, values, float(score)))
        with orbax_errors.one_line(self.folder):
            self._manager.reload()
        self._workdir.push()

    def _write_metrics(self, step: int, metrics: Mapping[str, float], score: float) -> None:
        folder = self.folder / str(step)
        try:
            metadata = checkpoint.read_metadata_of(folder)
        except checkpoint.DamagedError as error:  # since it was written
            raise InputError(checkpoint.damage_line(folder, str(error))) from None
        metadata["metrics"] = {n: x if math.isfinite(x) else None for n, x in metrics.items()}
        metadata["score"] = score if math.isfinite(score) else None
        path, text = checkpoint.metadata_file(folder), json.dumps(sealed_json.seal(metadata))
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
    ) -> tuple[TrainState, Metadata]:
        """Return the state as `target` (ShapeDtypeStruct with sharding) has it, and its metadata.

        The sharding that it was saved with plays no part. Without `step` it is the newest one
        that can be read: a damaged one is renamed to <step>.damaged, with a warning. Raises
        InputError if the given `step` is damaged, if there is no checkpoint, and for names, shapes
        or dtypes that do not fit.
        """
        if step is not None:
            return _restore(self.folder, checkpoint.find_step(self._workdir, step), target)
        for newest in reversed(distributed.of_first(lambda: checkpoint.steps(self._workdir))):
            folder = self.folder / str(newest)
            try:
                return _read_state(folder, target)
            except checkpoint.DamagedError as error:
                damage = str(error)  # Python unsets `error` below
            distributed.of_first(functools.partial(_set_aside, folder, damage))
            self._manager.reload()
        raise InputError(checkpoint.NO_READABLE.format(self.folder))

    def _set_aside_unreadable(self) -> None:
        for step in checkpoint.steps(self._workdir):
            # orbax would fail at metadata that is not JSON
            try:
                checkpoint.read_metadata(self._workdir, step)
            except checkpoint.DamagedError as error:
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


def _flatten(state: TrainState) -> dict[str, jax.Array | NDArray]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): x for path, x in leaves}


def _targets(target: TrainState) -> dict[str, Leaf]:
    leaves = jax.tree_util.tree_leaves_with_path(target)
    return {_name(path): x for path, x in leaves}


def _name(path: tuple) -> str:
    # "params.conv_in.kernel", "opt_state.1.0.mu.conv_in.kernel", "step": without optax's classes.
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _score(metadata: Metadata) -> float:
    return -math.inf if metadata["score"] is None else metadata["score"]


def _restore(folder: AnyPath, step: int, target: TrainState) -> tuple[TrainState, Metadata]:
    try:
        return _read_state(folder / str(step), target)
    except checkpoint.DamagedError as error:
        raise InputError(
            checkpoint.damage_line(folder / str(step), str(error)) + "; name another step"
        ) from None


def _read_state(folder: AnyPath, target: TrainState) -> tuple[TrainState, Metadata]:
    arrays, metadata = _agreed(lambda: _read_fitting(folder, target))
    _agreed(lambda: checkpoint.verify(checksum.of_fields(arrays), metadata))
    leaves = [arrays[name] for name in _targets(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), metadata


def _agreed(read: Callable[[], T]) -> T:
    """Return what `read` returns; raise DamagedError in all processes if it does in any.

    What comes next they do together.
    """
    found: list[T] = []
    damage: str | None = None
    try:
        found.append(read())
    except checkpoint.DamagedError as error:
        damage = str(error)
    if told := [said for said in distributed.of_all(damage) if said is not None]:
        raise checkpoint.DamagedError(told[0])
    return found[0]


def _read_fitting(
    folder: AnyPath, target: TrainState
) -> tuple[dict[str, jax.Array | NDArray], Metadata]:
    wanted = _targets(target)
    if any(x.sharding is None for x in wanted.values()):
        raise ValueError("every leaf of the target needs a sharding")  # or orbax takes the file's
    metadata = checkpoint.read_metadata_of(folder)
    stored = checkpoint.stored_shapes(folder)
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
    return checkpoint.read_arrays(folder, wanted), metadata


def _describe(array: Leaf | None) -> str:
    return "absent" if array is None else f"{array.dtype}{list(array.shape)}"


def _set_aside(folder: AnyPath, damage: str) -> None:
    aside = folder.with_name(folder.name + ".damaged")
    while aside.exists():
        aside = aside.with_name(aside.name + "~")
    try:
        folder.rename(aside)
    except OSError as failed:
        raise InputError(
            f"{checkpoint.damage_line(folder, damage)} and cannot be moved away: {failed.strerror}"
        ) from None
    logging.warning(
        "%s; it is renamed to %s, and the newest of the others is used",
        checkpoint.damage_line(folder, damage),
        aside,
    )
