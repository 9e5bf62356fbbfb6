"""What the campaign of faults counted, as a table and as docs/reports/faults.md."""

import datetime
import importlib.metadata
import os
import platform
from typing import NamedTuple

from fault_world import EVALUATED, GRACE, INTERVAL, World
from rich.table import Table


class Row(NamedTuple):
    """A line of the table: what was done, and what came of it. `wrong` says what should not be."""

    section: str
    what: str
    found: str
    wrong: tuple[str, ...] = ()


def table(rows: list[Row]) -> Table:
    shown = Table("", "", "")
    for row in rows:
        shown.add_row(row.section, row.what, row.found, style="red" if row.wrong else "")
    return shown


def report(rows: list[Row], world: World, seed: int, minutes: float) -> str:
    """Return the text of docs/reports/faults.md."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "orbax-checkpoint", "tensorstore")
    )
    lines = "".join(f"| {row.section} | {row.what} | {row.found} |\n" for row in rows)
    return f"""# Faults

What becomes of runs that are killed, stopped, starved of disk and damaged. Each is
`python -m r0_jax.main` in a process of its own on a pipeline in miniature: {world.steps} steps, a
checkpoint every {INTERVAL}, an evaluation every {EVALUATED}, one CPU device except where it says
so. In the end parameters, their average, the optimizer's state, metrics and sample images of every
run are compared to the bit with those of a run that nothing happened to.

Made by `make faults`, which is `python tests/support/faults.py --report=docs/reports/faults.md`,
with `--seed={seed}`, on {datetime.date.today()}: {minutes:.0f} minutes on {os.cpu_count()} CPU
cores ({platform.machine()}, {platform.system()}, Python {platform.python_version()}, {versions}).

| | what | counted |
|---|---|---|
{lines}
**What a kill costs.** A checkpoint is written in the background while training goes on, and gets
its name when all of it is on disk. The next one is not begun before that. So a killed run continues
from a checkpoint at most one interval old, or, if it was just writing one, from the one before; it
then does again one interval and the steps taken during the save. The runs here write checkpoints
so often that most of their time they are writing one.

**What SIGTERM costs** is nothing, if the grace time ({GRACE:.0f} s in Kubernetes) is longer than a
step and two saves, the one that may be going on and the last. An evaluation is broken off, between
its batches of 32 images, and made by the next start: the checkpoint is begun before it. A SIGTERM
during compilation saves nothing, and nothing is lost: no step was made since the last checkpoint.

**Damage.** orbax protects its indices; of the arrays and of the metadata we keep checksums. A
checkpoint that cannot be read or is not what was written becomes STEP.damaged, with a warning, and
is never deleted. Damage without harm is in files that are there for other readers, such as copies
of an index.
"""
