"""Spoiled files and odd flags, given to every reader and command: what comes of it. `make fuzz`.

    python tests/support/fuzz.py --report=docs/reports/fuzz.md        # 2,500 cases
    python tests/support/fuzz.py --cases=200 --quick                  # without slow imports
    python tests/support/fuzz.py --only=123 --seed=1                  # one case, shown

Everything is imported once. Each case is a fork, with limits of time and memory. Case i depends on
the seed and on i alone.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(ROOT), str(HERE)) if path not in sys.path]

import fuzz_targets  # noqa: E402
import mutations  # noqa: E402
from fuzz_targets import TARGETS, Target  # noqa: E402

from r0_jax import errors  # noqa: E402

CPU_SECONDS = 30
WALL_SECONDS = 300
MEMORY = 3 * 2**30  # bytes more than the process has after its imports
FILE = 2**28  # bytes of a file that a case writes
OK, CLEAN = "ok", "clean error"
FAULTS = ("traceback", "hang", "memory", "silent", "unclear")
# Texts of Python, numpy and PyTorch say nothing to a user.
_FOREIGN = re.compile(
    r"object is not|has no attribute|unhashable|0x[0-9a-f]{6,}|torch\.load|NoneType"
)
_STATUS = {0: OK, 2: CLEAN, 1: "traceback", 11: "memory", 12: "silent", 13: "unclear"}
# The slow imports; without them their targets are left out.
SLOW = {"a tfds folder": "tensorflow_datasets", "a pickle": "torch"}


class Case(NamedTuple):
    """A case and what came of it; `said` is its last line, or its traceback."""

    number: int
    target: str
    how: str
    verdict: str
    said: str


def run(
    cases: range | list[int],
    seed: int,
    whole: bool,
    jobs: int = 1,
    tell: Callable[[Case], None] = lambda case: None,
) -> list[Case]:
    """Run cases; return them in order. `tell` gets each when it has ended."""
    targets = [target for target in TARGETS if whole or target.name not in SLOW]
    for name in ("transformers", *(SLOW.values() if whole else ())):
        importlib.import_module(name)
    from transformers import BertTokenizer, CLIPTokenizer, T5TokenizerFast  # noqa: F401  lazy ones

    with tempfile.TemporaryDirectory() as root:
        world = Path(root, "world")
        if not (child := os.fork()):  # which starts JAX: a fork of that could hang
            _end(lambda: fuzz_targets.build(world, whole))
        if os.waitpid(child, 0)[1]:
            raise SystemExit("the world could not be built")
        left, running, found = list(cases)[::-1], {}, []
        while left or running:
            while left and len(running) < jobs:
                started = _Child(left.pop(), seed, targets, world, Path(root))
                running[started.pid] = started
            time.sleep(0.002)
            for pid in list(running):
                if (case := running[pid].ended()) is not None:
                    del running[pid]
                    found.append(case)
                    tell(case)
    return sorted(found)


class _Child:
    """A case that runs in a fork."""

    def __init__(self, number: int, seed: int, targets: list[Target], world: Path, root: Path):
        rng = random.Random(f"{seed}/{number}")
        self.number = number
        self.target = rng.choices(targets, [target.weight for target in targets])[0]
        self.folder = root / f"case_{number}"
        path, self.how = _spoiled(self.target, world, self.folder, rng)
        self._output = tempfile.TemporaryFile()
        self._begun = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            for number in (1, 2):
                os.dup2(self._output.fileno(), number)
            os.chdir(self.folder)  # relative outputs stay here
            os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(self.folder)
            _limit()
            _end(lambda: self._read(path, rng))

    def _read(self, path: Path, rng: random.Random) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            if wrong := self.target.read(path, self.folder, rng):
                print(wrong)
                return 12
        return 0

    def ended(self) -> Case | None:
        """Return the case if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self._begun < WALL_SECONDS:
            return None
        if not pid:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._output.seek(0)
        said = self._output.read().decode("utf-8", "replace")
        self._output.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        killed = "hang" if -code in (signal.SIGXCPU, signal.SIGKILL) else "traceback"
        verdict = _STATUS.get(code, killed)
        if verdict == CLEAN:
            verdict = _judge(said, self.target)
        return Case(self.number, self.target.name, self.how, verdict, said)


def _spoiled(target: Target, world: Path, folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Return the spoiled file in a copy of the target's folder, and how it was spoiled."""
    if not target.spoiled:
        folder.mkdir()
        return world, "flags"
    shutil.copytree(world / target.folder, folder)
    found = sorted(path for path in folder.glob(target.spoiled) if path.is_file())
    path = rng.choice(found)
    return path, mutations.spoil(path, rng)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(work) -> None:
    """Do the work of a fork and end it with a status that tells what came of it."""
    status = 1
    try:
        status = work() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except BaseException as error:
        status, line = errors.explain(error)
        if line is None:
            traceback.print_exc()
        else:
            print(f"error: {line}")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _judge(said: str, target: Target) -> str:
    """Return the verdict of a case that ended as an error of the user."""
    lines = [line for line in said.split("\n") if line]
    last = lines[-1] if lines else ""
    if "error: out of memory" in said:
        return "memory"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if not last.startswith("error: ") or any(not char.isprintable() for char in last):
        return "unclear"
    return "unclear" if _FOREIGN.search(last) else CLEAN


def _report(found: list[Case], seed: int) -> str:
    """Return the text of docs/reports/fuzz.md."""
    verdicts = (OK, CLEAN, *FAULTS)
    counted = collections.Counter((case.target, case.verdict) for case in found)
    rows = ""
    for name in [*dict.fromkeys(target.name for target in TARGETS)]:
        counts = [counted[name, verdict] for verdict in verdicts]
        rows += f"| {name} | {sum(counts)} | {' | '.join(map(str, counts))} |\n"
    total = [sum(case.verdict == verdict for case in found) for verdict in verdicts]
    rows += f"| **all** | {len(found)} | {' | '.join(map(str, total))} |\n"
    return f"""# Fuzzing

Each case spoils one file of a kind, or gives a command odd flags, and looks at what comes of it.
Files are cut short, have bits flipped, bytes inserted, deleted, repeated and replaced; values of
JSON and headers become other ones, among them sizes that nothing backs up; a file becomes a pipe, a
folder, a device, a Git LFS pointer or a web page. Every case is a fork of one process, with
{CPU_SECONDS} s of a core and {MEMORY // 2**30} GiB of memory.

- *ok*: it was read, as a change without harm is.
- *clean error*: one line that begins with "error:", and exit status 2.
- *traceback*, *hang*, *memory*: an exception that is not for users, no end in time, or more memory
  than the file backs up.
- *silent*: what was read is not what such a file may hold, without a word: numbers that are not
  finite, control characters in prompts, an edited file under a seal.
- *unclear*: an error whose line has control characters or speaks of Python objects.

Made by `make fuzz`, which is `python tests/support/fuzz.py --report=docs/reports/fuzz.md`, with
`--seed={seed} --cases={len(found)}`.

| | cases | {" | ".join(verdicts)} |
|---|{"---:|" * (1 + len(verdicts))}
{rows}"""


def _read(log: Path | None) -> list[Case]:
    """Return the cases in a log; the last run of a case counts."""
    if log is None or not log.is_file():
        return []
    return [Case(*json.loads(line)) for line in log.read_text("utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", type=int, action="append")
    parser.add_argument(
        "--log",
        type=Path,
        help="what each case said, a line of JSON each; one that is there is continued: what ended "
        "well is not run again",
    )
    given = parser.parse_args()
    cases = given.only or range(given.cases)
    known = {case.number: case for case in _read(given.log) if case.verdict not in FAULTS}

    def tell(case: Case) -> None:
        if given.log:
            with given.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(case) + "\n")
        if case.verdict in FAULTS:
            said = case.said.strip().splitlines()[-1:] or [""]
            print(case.number, case.target, case.how, case.verdict, said[0][:300], flush=True)

    left = [number for number in cases if number not in known]
    found = run(left, given.seed, not given.quick, given.jobs, tell)
    found = sorted([*found, *(known[number] for number in cases if number in known)])
    if given.only:
        for case in found:
            print(case.target, case.how, case.verdict, case.said, sep="\n")
    counts = collections.Counter(case.verdict for case in found)
    print(json.dumps(counts))
    if given.report:
        given.report.write_text(_report(found, given.seed), "utf-8")
    return int(any(counts[verdict] for verdict in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
