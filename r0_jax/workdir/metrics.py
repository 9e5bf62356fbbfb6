"""Writes the numbers of a run: metrics.jsonl, and TensorBoard and W&B on request; its pace."""

import contextlib
import io
import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, SupportsFloat, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.files import write_bytes


class MetricWriter:
    """Appends to `workdir`/metrics.jsonl, one strict JSON object a line with its `step`.

    It writes null for a number that is not finite. Only process 0 writes.

    Attributes:
      path: the file.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        tensorboard: bool = True,
        wandb: bool = False,
        resume_step: int | None = None,
        evaluated: bool = True,
    ):
        """Open the files for appending.

        With `resume_step` it drops what a former run wrote after that step (-1: all of it), so that
        nothing is there twice. Where that step is not `evaluated`, it drops what an evaluation of
        it wrote, too. It also drops half a line, which a kill leaves.
        """
        self.path = Path(workdir) / "metrics.jsonl"
        self._file = self._events = self._wandb = None
        if jax.process_index() != 0:
            return
        if wandb:
            self._wandb = _start_wandb(self.path.parent)
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _repair(self.path, math.inf if resume_step is None else float(resume_step), evaluated)
            self._file = _open(self.path)
            if tensorboard:
                self._events = _TensorBoard(self.path.parent / "tensorboard", resume_step)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write one line, which is on disk when this returns. Several lines may share a step."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {n: value if math.isfinite(value) else None for n, value in values.items()}
        line = json.dumps({"step": int(step)} | finite, allow_nan=False) + "\n"
        with _writing(self.path):
            _append(self._file, line.encode("utf-8"))
            if self._events:
                self._events.scalars(step, values)
        if self._wandb:
            self._wandb.log(values, step=step)

    def write_images(
        self, step: int, images: Mapping[str, UInt8[NDArray[np.uint8], "h w c"]]
    ) -> None:
        """Log image grids to TensorBoard and W&B only; the caller writes image files."""
        if self._events:
            with _writing(self.path):
                self._events.images(step, images)
        if self._wandb:
            import wandb

            self._wandb.log({n: wandb.Image(image) for n, image in images.items()}, step=step)

    def close(self) -> None:
        """Close the files; it may be called again."""
        with _writing(self.path):
            for file in (self._file, self._events):
                if file:
                    file.close()
        if self._wandb:
            self._wandb.finish()
        self._file = self._events = self._wandb = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Throughput:
    """Images per second and the time left, from the times when steps were done."""

    def __init__(
        self,
        steps: int,
        images_per_step: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Start the clock; `steps` is the last step, `images_per_step` the global batch."""
        self._steps, self._images, self._clock = steps, images_per_step, clock
        self._first = self._last = (start_step, clock())
        self._compiled = False

    def update(self, step: int) -> dict[str, float]:
        """Return perf/images_per_sec since the last update and perf/seconds_left, after `step`.

        The time up to the first update is mostly compilation: only that update includes it.
        """
        now = self._clock()
        (last_step, last), (first_step, first) = self._last, self._first
        seconds = max(now - last, 1e-9)
        left = (now - first) / max(step - first_step, 1) * (self._steps - step)
        if not self._compiled:
            self._compiled, self._first = True, (step, now)
        self._last = (step, now)
        return {
            "perf/images_per_sec": (step - last_step) * self._images / seconds,
            "perf/seconds_left": left,
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the training (evaluation, a blocking save)."""
        start = self._clock()
        try:
            yield
        finally:
            away = self._clock() - start
            self._first = (self._first[0], self._first[1] + away)
            self._last = (self._last[0], self._last[1] + away)


class _TensorBoard:
    """An event file, written in this thread with parts of tensorboardX.

    Its SummaryWriter hands events to a thread through a bounded queue. When the disk is full that
    thread dies, and the training blocks for ever once the queue is full, too.
    """

    def __init__(self, folder: Path, resume_step: int | None):
        with _without_torch():
            from tensorboardX import record_writer, summary  # 1 s to import
            from tensorboardX.proto import event_pb2

        self._crc, self._summary, self._event = record_writer.masked_crc32c, summary, event_pb2
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = _open(folder / f"events.out.tfevents.{time.time_ns()}")
        self._write(file_version="brain.Event:2")
        if resume_step is not None:  # tells TensorBoard to hide what came after it
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=resume_step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self._summary.scalar(name, value))

    def images(self, step: int, images: Mapping[str, NDArray]) -> None:
        for name, image in images.items():
            self._write(step=step, summary=self._summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: object) -> None:
        data = self._event.Event(wall_time=time.time(), **content).SerializeToString()
        size = struct.pack("<Q", len(data))
        crcs = [struct.pack("<I", self._crc(part)) for part in (size, data)]
        _append(self._file, size + crcs[0] + data + crcs[1])


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide torch from tensorboardX.

    It imports torch wherever it is installed, for seconds and a gigabyte of memory, and does
    without it otherwise.
    """
    before = sys.modules.get("torch")
    sys.modules["torch"] = None  # type: ignore[assignment]  # as importlib documents it
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is not None:
            sys.modules["torch"] = before


@runtime_checkable
class _Wandb(Protocol):
    """A run of Weights & Biases: what is used of it."""

    def log(self, values: Mapping[str, object], step: int) -> None:
        """Log the values of a step."""

    def finish(self) -> None:
        """End the run when all is sent."""


def _start_wandb(workdir: Path) -> _Wandb:
    try:
        import wandb
    except ImportError:
        raise InputError("wandb is not installed: pip install wandb, or set wandb=False") from None
    # The id lives in the workdir, so that a resumed run continues the same W&B run.
    path = workdir / "wandb_id"
    if not path.exists():
        write_bytes(path, os.urandom(8).hex().encode())
    run = path.read_text(encoding="utf-8")
    try:
        return wandb.init(
            project="r0_jax", name=workdir.name, dir=str(workdir), id=run, resume="allow"
        )
    except Exception as error:  # of its service or its settings
        raise InputError(
            f"wandb does not start ({' '.join(str(error).split())}): run `wandb login`"
            ", or set WANDB_MODE=offline or wandb=False"
        ) from None


def _open(path: Path) -> io.FileIO:
    # Unbuffered: memory holds nothing that a kill would lose or a full disk would reject again.
    return path.open("ab", buffering=0)


def _append(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _repair(path: Path, last_step: float, evaluated: bool) -> None:
    """Drop lines after `last_step` and what is not a whole line, all or nothing.

    Unless `last_step` is `evaluated`, drop also the lines of its evaluation.
    """
    if not path.exists():
        return

    def is_kept(line: bytes) -> bool:
        step = _step(line)
        return step < last_step or (
            step == last_step
            and (evaluated or any(name.startswith("train/") for name in json.loads(line)))
        )

    old = path.read_bytes()
    lines = [line for line in old.split(b"\n") if is_kept(line)]
    new = b"".join(line + b"\n" for line in lines)
    if new != old:
        write_bytes(path, new)


def _step(line: bytes) -> float:
    """Return the step of a line; NaN, which is not <= anything, where the line is not whole."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.nan


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {error.filename or path}: {reason}; free space or choose another workdir"
        ) from error
