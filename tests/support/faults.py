"""Runs of the main job killed, stopped, starved and damaged: what they lose. `make faults`.

    python tests/support/faults.py --report=docs/reports/faults.md    # all: 15 minutes, two cores
    python tests/support/faults.py --kills=3 --sections=kills # a part; --seed=N draws other moments

Each run is `python -m r0_jax.main` in a process of its own, and is done when it has come to its end
and equals an undisturbed one to the bit: parameters, average, optimizer, metrics, images.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(ROOT), str(HERE)) if path not in sys.path]

import fault_programs  # noqa: E402
import fault_world  # noqa: E402
from fault_disk import small_disk  # noqa: E402
from fault_report import Row, report, table  # noqa: E402
from fault_world import GRACE, INTERVAL, Process, World  # noqa: E402
from rich.console import Console  # noqa: E402

from r0_jax.errors import STOPPED  # noqa: E402
from r0_jax.workdir import checkpoint  # noqa: E402
from r0_jax.workdir.workdir import LocalWorkdir  # noqa: E402

console = Console(stderr=True, highlight=False)


SAVED_ON = (8, "--config.mesh.data=2", "--config.mesh.fsdp=4")
MESHES = ((1, 4), (1, 1), (2, 1), (4, 2), (2, 4), (4, 1), (1, 2), (1, 8))  # data, fsdp


class Counts(NamedTuple):
    """How much of each is done."""

    kills: int = 30
    damages: int = 60
    damaged_runs: int = 3
    stops: int = 8
    meshes: int = len(MESHES)
    disks: int = 8


# --- meshes ------------------------------------------------------------------------------


def meshes(world: World, counts: Counts, rng: random.Random) -> list[Row]:
    """Saved on 2 x 4 devices, restored on others."""
    del rng
    workdir = world.folder / "eight"
    devices, *mesh = SAVED_ON
    world.run(
        workdir, "--config.steps=3", *mesh, devices=devices, program="fault_programs train"
    ).must_end_well()
    wanted, wrong, done = None, [], []
    for data, fsdp in MESHES[: counts.meshes]:
        process = world.start(
            workdir,
            f"--config.mesh.data={data}",
            f"--config.mesh.fsdp={fsdp}",
            devices=data * fsdp,
            program="fault_programs restore",
            stdout=subprocess.PIPE,
            text=True,
        )
        out, _ = process.communicate()
        # It is stopped after the restore.
        if process.returncode != STOPPED or "Traceback" in process.said:
            wrong.append(f"{data} x {fsdp}: status {process.returncode}: {process.said[-300:]}")
            continue
        found = json.loads(out)
        wanted = wanted or {
            name: fault_programs.digest(x) for name, x in fault_world.arrays(workdir, 3).items()
        }
        if found["digests"] != wanted:
            wrong.append(f"{data} x {fsdp}: other numbers")
        if found["devices"] != data * fsdp or (found["split"] > 0) != (fsdp > 1):
            wrong.append(
                f"{data} x {fsdp}: {found['devices']} devices, {found['split']} arrays are split"
            )
        done.append(f"{data} x {fsdp}")
    bytes_equal = f"{len(done)} of {counts.meshes} bit-equal: {', '.join(done)} (data x fsdp)"
    return [
        Row(
            "meshes",
            f"saved on 2 x 4 devices, {len(wanted or {})} arrays, restored on",
            bytes_equal,
            tuple(wrong),
        )
    ]


# --- kills -------------------------------------------------------------------------------


class Kill(NamedTuple):
    """What a kill -9 found and left.

    Attributes:
      kept: the step of the newest checkpoint; None before the first.
      saving: of the one that was being written, None without.
      reached: the last step whose metrics were written.
    """

    moment: str
    kept: int | None
    saving: int | None
    reached: int

    @property
    def lost(self) -> int:
        return self.reached - (self.kept or 0)

    @property
    def wrong(self) -> list[str]:
        begun = self.kept if self.saving is None else self.saving
        if self.reached - (begun or 0) > INTERVAL:
            return [f"{self}: no save was begun for more than one interval"]
        if self.saving is not None and self.kept is not None and self.saving - self.kept > INTERVAL:
            return [f"{self}: the one before is more than one interval old"]
        return []


# The first few tell the most where few are wanted.
MOMENTS = {
    "in a save": fault_world.in_a_save,
    "in training": fault_world.in_training,
    "in an evaluation": fault_world.in_an_evaluation,
    "at any time": fault_world.anytime,
}


def kills(world: World, counts: Counts, rng: random.Random) -> list[Row]:
    """kill -9, several in a row on one run, until there were enough; each run then ends."""
    done: list[Kill] = []
    wrong: list[str] = []
    runs = 0
    while len(done) < counts.kills:
        runs += 1
        workdir = world.folder / f"killed{runs}"
        kept, ended = None, False
        while not ended:
            before = fault_world.unfinished(workdir)
            process = world.start(workdir)
            if len(done) < counts.kills:
                moment = [*MOMENTS][len(done) % len(MOMENTS)]
                MOMENTS[moment](world, process, rng)
                process.kill()
            ended = process.wait() == 0
            if "Traceback" in process.said or process.returncode not in (0, -signal.SIGKILL):
                wrong.append(f"status {process.returncode}: {process.said[-300:]}")
                break
            if process.continued_from not in (None, kept):
                wrong.append(f"continued from {process.continued_from}, but {kept} is there")
            if not ended:
                left = [step for step, _ in fault_world.unfinished(workdir) - before]
                kept = max(checkpoint.steps(LocalWorkdir(workdir)), default=None)
                done.append(Kill(moment, kept, max(left, default=None), last_reached(process)))
                wrong += done[-1].wrong
                console.print(f"{len(done)}. killed {moment}: {done[-1]}")
        wrong += [f"{workdir.name}: {what}" for what in world.differences(workdir)]
    lost = [kill.lost for kill in done]
    saving = sum(kill.saving is not None for kill in done)
    if saving == 0:
        wrong.append("no kill came in a save")
    by_moment = ", ".join(f"{n} {moment}" for moment, n in Counter(k.moment for k in done).items())
    return [
        Row("kill -9", "at random moments", f"{len(done)}: {by_moment}"),
        Row("kill -9", "came while a checkpoint was being written", str(saving)),
        Row(
            "kill -9",
            "started again from the newest checkpoint, to the end",
            f"{len(done)} of {len(done)}" if not wrong else "NOT ALWAYS",
            tuple(wrong),
        ),
        Row(
            "kill -9",
            f"steps done again, checkpoints every {INTERVAL}",
            f"median {statistics.median(lost):.0f}, most {max(lost)}, of them in a save "
            f"{max((k.lost for k in done if k.saving is not None), default=0)}, otherwise "
            f"{max((k.lost for k in done if k.saving is None), default=0)}",
        ),
        Row(
            "kill -9",
            "runs that ended bit-equal to the undisturbed one",
            f"{runs} of {runs}" if not wrong else "NOT ALL",
        ),
    ]


def last_reached(process: Process) -> int:
    """The last step of which a killed process, or one before it, wrote metrics."""
    return fault_world.last_logged(process.workdir, process)


# --- damages -----------------------------------------------------------------------------


def damages(world: World, counts: Counts, rng: random.Random) -> list[Row]:
    """The newest checkpoint damaged: in copies that are only restored, then in runs that go on."""
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "fault_programs",
            "damage",
            str(world.whole),
            str(counts.damages),
            str(rng.randrange(2**32)),
        ],
        cwd=ROOT,
        env=fault_world.environment(2),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    found = [json.loads(line) for line in process.stdout.splitlines()]
    outcomes = Counter(x["outcome"] for x in found)
    wrong = [
        f"{x['how']} {x['file']}: {x['outcome']}"
        for x in found
        if x["outcome"] not in ("set aside", "harmless")
    ]
    if len(found) < counts.damages or "Traceback" in process.stderr:
        wrong.append(
            f"status {process.returncode}: "
            f"{process.stderr[max(process.stderr.find('Traceback') - 500, 0) :][:3000]}"
        )
    warned = process.stderr.count("the newest of the others is used")
    if warned != outcomes["set aside"]:
        wrong.append(f"{outcomes['set aside']} set aside, but {warned} warnings")
    ways = ", ".join(f"{n} {how}" for how, n in Counter(x["how"] for x in found).items())
    rows = [
        Row("damage", "a random file of the newest checkpoint", f"{len(found)}: {ways}"),
        Row(
            "damage",
            "set aside with a warning, the one before restored bit-equal",
            str(outcomes["set aside"]),
        ),
        Row(
            "damage",
            "in what is not read: the newest restored bit-equal",
            str(outcomes["harmless"]),
        ),
        Row("damage", "tracebacks, wrong numbers", str(len(wrong)), tuple(wrong)),
    ]
    return [*rows, damaged_runs(world, counts, rng)] if counts.damaged_runs else rows


def damaged_runs(world: World, counts: Counts, rng: random.Random) -> Row:
    """Runs stopped in the middle whose newest checkpoint was cut short, to the end."""
    wrong = []
    for number in range(counts.damaged_runs):
        workdir = world.folder / f"damaged{number}"
        process = world.start(workdir)
        fault_world.in_training(world, process, rng)
        fault_world.in_training(world, process, rng)
        fault_world.stop(process)
        *_, before, newest = checkpoint.steps(LocalWorkdir(workdir))
        while True:  # until it is one that matters
            how, file = fault_programs.harm(
                workdir / "checkpoints" / str(newest), rng, rng.choice([0, 2, 3])
            )
            if file.startswith("state/d/") or file == "metrics/metrics":
                break
        process = world.run(workdir)
        if (
            (process.returncode, process.continued_from) != (0, before)
            or f"{newest}.damaged" not in process.said
            or "Traceback" in process.said
        ):
            wrong.append(f"{file} {how}: {process.said[-500:]}")
        wrong += [f"{file} {how}: {what}" for what in world.differences(workdir)]
        console.print(f"{newest}/{file} {how}: continued from {process.continued_from}")
    return Row(
        "damage",
        "runs that resumed from the one before and ended bit-equal",
        f"{counts.damaged_runs - len(wrong)} of {counts.damaged_runs}",
        tuple(wrong),
    )


# --- a full disk -------------------------------------------------------------------------


def disks(world: World, counts: Counts, rng: random.Random) -> list[Row]:
    """Runs that fill a disk, at first and later, and go on when there is room again."""
    del rng
    wrong, where, failed = [], Counter(), 0
    with contextlib.ExitStack() as held:
        disk = held.enter_context(small_disk(world.folder / "disk"))
        workdir = disk.folder / "run"
        for number in range(counts.disks):
            # A checkpoint takes about 200 kB on a disk.
            steps = checkpoint.steps(LocalWorkdir(workdir))
            rooms = (0, 8_000, 60_000, 120_000) if steps else (0, 30_000, 150_000, 400_000)
            room = rooms[number % 4]
            process = disk.run(world, workdir, room)
            console.print(
                f"{room} bytes of room after step {max(steps, default=None)}: status "
                f"{process.returncode}: {process.said[-200:].strip()}"
            )
            errors = [line for line in process.said.splitlines() if line.startswith("error: ")]
            if process.returncode != 2 or len(errors) != 1 or "Traceback" in process.said:
                wrong.append(
                    f"{room} bytes of room, status {process.returncode}: {process.said[-1500:]}"
                )
            elif max(checkpoint.steps(LocalWorkdir(workdir)), default=-1) < max(steps, default=-1):
                wrong.append(
                    f"{steps} were there, {checkpoint.steps(LocalWorkdir(workdir))} are left"
                )
            else:
                failed += 1
                place = re.search(r"/run/(\w+)", errors[0])
                where[place[1] if place else "the run's folder"] += 1
            if number % 4 == 3 or number == counts.disks - 1:  # room again, for some steps
                process = disk.start_with_room(world, workdir)
                fault_world.in_training(world, process, random.Random(number))
                fault_world.stop(process)
        world_run = disk.start_with_room(world, workdir)
        world_run.wait()
        wrong += world.differences(workdir)
        if world_run.returncode or "Traceback" in world_run.said:
            wrong.append(f"with room again: {world_run.said[-500:]}")
        kind = disk.kind
    places = ", ".join(f"{n} at {name}" for name, n in where.items())
    return [
        Row(
            "full disk",
            f"one line, status 2, the last checkpoint kept ({kind})",
            f"{failed} of {counts.disks}: {places}",
            tuple(wrong),
        ),
        Row(
            "full disk",
            "the run resumed when there was room, and ended bit-equal",
            "yes" if not wrong else "NO",
        ),
    ]


# --- SIGTERM -----------------------------------------------------------------------------


def stops(world: World, counts: Counts, rng: random.Random) -> list[Row]:
    """SIGTERM, several in a row on one run; what it has done is saved in time."""
    seconds, wrong, early, runs = [], [], 0, 0
    while len(seconds) < counts.stops:
        runs += 1
        workdir, ended = world.folder / f"stopped{runs}", False
        while not ended:
            process = world.start(workdir)
            if len(seconds) >= counts.stops:
                ended = process.wait() == 0
                if not ended:
                    wrong.append(f"status {process.returncode}: {process.said[-300:]}")
                break
            moment = [*MOMENTS][len(seconds) % len(MOMENTS)]
            MOMENTS[moment](world, process, rng)
            if process.poll() is not None:
                ended = True
                continue
            took = fault_world.stop(process)
            console.print(
                f"stopped {moment} within {took} s, status {process.returncode}: "
                f"{process.said.splitlines()[-1:]}"
            )
            if took is None:
                wrong.append(f"not ended after {GRACE:.0f} s")
            seconds.append(took or GRACE)
            saved = max(checkpoint.steps(LocalWorkdir(workdir)), default=0)
            if process.returncode == -signal.SIGTERM and (
                process.continued_from is None or saved == world.steps
            ):
                early += 1  # while Python was still importing, or was about to end
                continue
            ended = process.returncode == 0
            named = re.search(r"stopped at step (\d+)", process.said)  # unless before its first
            if (
                process.returncode not in (0, STOPPED)
                or "Traceback" in process.said
                or (named and int(named[1]) != saved)
                or (last_reached(process) != saved)
                or ended == ("stopped" in process.said)
            ):
                wrong.append(
                    f"status {process.returncode}, step {last_reached(process)}, saved "
                    f"{saved}: {process.said[-300:]}"
                )
        wrong += [f"{workdir.name}: {what}" for what in world.differences(workdir)]
    return [
        Row(
            "SIGTERM",
            "at random moments; saved to the last step",
            f"{len(seconds) - early}, and {early} when there was nothing to save",
            tuple(wrong),
        ),
        Row(
            "SIGTERM",
            f"seconds to save and end, of {GRACE:.0f}",
            f"median {statistics.median(seconds):.1f}, most {max(seconds):.1f}",
        ),
        Row(
            "SIGTERM",
            "runs that resumed and ended bit-equal to the undisturbed one",
            f"{runs} of {runs}" if not wrong else "NOT ALL",
        ),
    ]


# --- all of it ---------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[World, Counts, random.Random], list[Row]]] = {
    "meshes": meshes,
    "damages": damages,
    "disks": disks,
    "stops": stops,
    "kills": kills,
}


def campaign(
    folder: Path, counts: Counts, seed: int, steps: int, sections: tuple[str, ...] = tuple(SECTIONS)
) -> tuple[list[Row], World]:
    """The rows of the table; what went wrong is in them."""
    world = World(folder, steps)
    console.print(f"an undisturbed run of {steps} steps: {world.seconds:.1f} s")
    rows = []
    for name in sections:
        rows += (new := SECTIONS[name](world, counts, random.Random(f"{seed} {name}")))
        for row in new:
            console.print(f"{row.section}: {row.what}: {row.found}")
            for what in row.wrong:
                console.print(f"WRONG {what}", style="bold red", markup=False)
    return rows, world


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="write the table to this file")
    parser.add_argument("--folder", type=Path, help="of the runs; by default a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of %(default)s")
    for name, count in Counts()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count)
    given = parser.parse_args()
    counts = Counts(**{name: getattr(given, name) for name in Counts._fields})
    begin = time.monotonic()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    rows, world = campaign(
        folder, counts, given.seed, given.steps, tuple(given.sections.split(","))
    )
    Console().print(table(rows))
    if any(row.wrong for row in rows):
        console.print(f"something is wrong; the runs are in {folder}", style="bold red")
        return 1
    shutil.rmtree(folder)
    if given.report:
        given.report.write_text(
            report(rows, world, given.seed, (time.monotonic() - begin) / 60), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
