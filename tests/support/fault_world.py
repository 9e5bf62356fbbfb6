"""A run that takes seconds, to be killed, starved and damaged; and what an undisturbed one says."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fast_xla
import numpy as np

from r0_jax.stand_ins import miniature, miniature_tokenizer
from r0_jax.workdir import checkpoint
from r0_jax.workdir.workdir import LocalWorkdir

ROOT = Path(__file__).parents[2]
INTERVAL = 2  # steps between checkpoints
EVALUATED = 8  # steps between evaluations
GRACE = 30.0  # seconds between SIGTERM and SIGKILL, Kubernetes' default

RECIPE = """
from r0_jax import config as base

def get_config():
    config = base.get_config()
    config.pretrained = {folder!r} + "/pipeline"
    config.data.prompts = {folder!r} + "/prompts.txt"
    config.compilation_cache = {folder!r} + "/cache"
    with config.unlocked():
        config.rewards.red = base.reward_entry("function", function="fault_programs:redness")
        config.heldout_rewards.blue = base.reward_entry("function",
                                                          function="fault_programs:blueness")
    config.objective.method = "r0plus"
    config.objective.normalization = "running_std"  # more state to lose
    config.regularizers.weight.weight = 1e-3
    config.sampler.num_steps = 1
    config.lora.rank = 4
    config.optimizer.learning_rate = 1e-3
    config.steps, config.batch_size = {steps}, 8
    config.checkpoint_every, config.eval_every = {interval}, {evaluated}
    config.keep_checkpoints = 2
    config.eval.num_prompts = config.eval.grid = 4
    config.best_metric = "heldout/blue"
    config.tensorboard = False
    return config
"""


class World:
    """Pretrained folder, prompts and recipe of the runs, one of which went undisturbed.

    Attributes:
      whole: the workdir of that one, whose programs the others find compiled.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        # What a restart costs is tracing: as few layers as there can be.
        miniature.write(
            folder / "pipeline",
            "StableDiffusionPipeline",
            text_encoder={"num_hidden_layers": 1},
            unet={"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
            vae={
                "block_out_channels": [8],
                "sample_size": 8,
                "down_block_types": ["DownEncoderBlock2D"],
                "up_block_types": ["UpDecoderBlock2D"],
            },
        )
        prompts = miniature_tokenizer.PROMPTS + [f"{number} stars" for number in range(11)]
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        (folder / "recipe.py").write_text(
            RECIPE.format(folder=str(folder), steps=steps, interval=INTERVAL, evaluated=EVALUATED),
            encoding="utf-8",
        )
        self.whole = folder / "whole"
        self.run(self.whole).must_end_well()

    @functools.cached_property
    def seconds(self) -> float:
        """How long an undisturbed run takes that finds its programs compiled."""
        begin = time.monotonic()
        self.run(self.folder / "timed").must_end_well()
        return time.monotonic() - begin

    def start(
        self,
        workdir: Path,
        *flags: str,
        devices: int = 1,
        program: str = "r0_jax.main",
        **popen: Any,
    ) -> "Process":
        """The main job in `workdir`; `program` may be another module, with its argument."""
        command = [
            sys.executable,
            "-m",
            *program.split(),
            f"--config={self.folder / 'recipe.py'}",
            f"--workdir={workdir}",
            *flags,
        ]
        return Process(command, workdir, environment(devices), **popen)

    def run(self, workdir: Path, *flags: str, **options: Any) -> "Process":
        """The same, to its end."""
        process = self.start(workdir, *flags, **options)
        process.wait()
        return process

    def differences(self, workdir: Path) -> list[str]:
        """What of a finished run is not, to the bit, as in the undisturbed one."""
        found = []
        ours, theirs = (measured(path) for path in (workdir, self.whole))
        if [line["step"] for line in ours if "train/loss" in line] != [*range(1, self.steps + 1)]:
            found.append("metrics.jsonl does not have each step once")
        elif ours != theirs:
            found.append("metrics.jsonl differs")
        if checkpoint.steps(LocalWorkdir(workdir)) != checkpoint.steps(LocalWorkdir(self.whole)):
            found.append(f"there are checkpoints of {checkpoint.steps(LocalWorkdir(workdir))}")
        elif not same(*(arrays(path, self.steps) for path in (workdir, self.whole))):
            found.append("the last checkpoint differs")
        for path in sorted((self.whole / "samples").iterdir()):
            other = workdir / "samples" / path.name
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                found.append(f"{path.name} differs")
        if unfinished(workdir) or not (workdir / "report.html").is_file():
            found.append("a half-written checkpoint is left, or there is no report")
        return found


_SAID = tempfile.TemporaryDirectory(prefix="faults-said-")  # not on a disk that is to be full


class Process(subprocess.Popen):
    """A run whose standard error is kept in a file, so that no pipe fills up.

    Attributes:
      workdir: of the run.
    """

    def __init__(self, command: list[str], workdir: Path, env: dict[str, str], **popen: Any):
        self.workdir = workdir
        self._said = Path(_SAID.name, f"{workdir.name}.{time.monotonic_ns()}")
        popen = {"stdout": subprocess.DEVNULL} | popen
        with self._said.open("wb") as file:
            super().__init__(command, cwd=ROOT, env=env, stderr=file, **popen)

    @property
    def said(self) -> str:
        return self._said.read_text("utf-8", errors="replace")

    @property
    def continued_from(self) -> int | None:
        """The step that it said it continues from, if it has come so far."""
        found = re.search(r"continues from step (\d+)", self.said)
        return int(found[1]) if found else None

    def must_end_well(self) -> None:
        if self.wait() != 0 or "Traceback" in self.said:
            raise AssertionError(f"status {self.returncode}:\n{self.said}")


def environment(devices: int) -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    return os.environ | {
        "PYTHONPATH": paths,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{fast_xla.FLAGS} --xla_force_host_platform_device_count={devices}",
        **fast_xla.KEEP,
    }


# --- moments -----------------------------------------------------------------------------


def anytime(world: World, process: Process, rng: random.Random) -> None:
    """Returns at a moment of a run's life, its start and its end included."""
    _until(process, time.monotonic() + rng.uniform(0, world.seconds), lambda: False)


def in_training(world: World, process: Process, rng: random.Random) -> None:
    """Returns within a few steps."""
    del world
    goal = last_logged(process.workdir, process) + rng.randint(1, 4 * INTERVAL)
    _until(process, None, lambda: last_logged(process.workdir, process) >= goal)
    time.sleep(rng.uniform(0, 0.2))


def in_a_save(world: World, process: Process, rng: random.Random) -> None:
    """Returns when a checkpoint is being written, one of the next few."""
    del world
    before, seen, wanted = unfinished(process.workdir), set(), rng.randint(1, 4)

    def begun() -> bool:
        seen.update(unfinished(process.workdir) - before)
        return len(seen) >= wanted

    _until(process, None, begun)
    time.sleep(rng.uniform(0, 0.05))


def in_an_evaluation(world: World, process: Process, rng: random.Random) -> None:
    """Returns when one has just begun: the metrics of its step are written, and none of its own."""
    del world
    before = len(list(lines(process.workdir)))

    def begun() -> bool:
        found = list(lines(process.workdir))
        return (
            len(found) > before
            and found[-1]["step"] % EVALUATED == 0
            and ("train/loss" in found[-1])
        )

    _until(process, None, begun)
    time.sleep(rng.uniform(0, 0.05))


def _until(process: Process, deadline: float | None, condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        if deadline is not None and time.monotonic() >= deadline:
            return
        time.sleep(0.002)


# --- what lies in a workdir --------------------------------------------------------------


def unfinished(workdir: Path) -> set[tuple[int, int]]:
    """Step and inode of each checkpoint that was begun and has not got its name."""
    found = set()
    folder = workdir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.endswith(".orbax-checkpoint-tmp"):
            try:
                found.add((int(path.name.split(".")[0]), path.stat().st_ino))
            except FileNotFoundError:  # it just got its name
                pass
    return found


def lines(workdir: Path) -> Iterator[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text("utf-8") if path.is_file() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        yield json.loads(line)


def last_logged(workdir: Path, process: Process | None = None) -> int:
    """The last step in metrics.jsonl. That of a `process` which has not yet dropped what came after
    its checkpoint is the checkpoint's."""
    last = max((line["step"] for line in lines(workdir)), default=0)
    if process is not None and process.continued_from is None:
        last = min(last, max(checkpoint.steps(LocalWorkdir(workdir)), default=0))
    return last


def measured(workdir: Path) -> list[dict]:
    """metrics.jsonl without the clock's numbers, all of a step in one."""
    found: dict[int, dict] = {}
    for line in lines(workdir):
        found.setdefault(line["step"], {}).update(
            {name: value for name, value in line.items() if not name.startswith("perf/")}
        )
    return list(found.values())


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: parameters, their average, the optimizer's state, counters."""
    folder = workdir.resolve() / "checkpoints" / str(step)
    return checkpoint.read_arrays(folder, checkpoint.stored_shapes(folder))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def stop(process: Process) -> float | None:
    """Seconds from SIGTERM to the end; None where the grace time was not enough."""
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    return time.monotonic() - begin
