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
`python -m r0_jax.main` in a process of its own, on a pipeline in miniature: {world.steps} steps, a
checkpoint every {INTERVAL}, an evaluation every {EVALUATED}. It has one CPU device except where a
row says otherwise. At the end each run is compared to the bit with an undisturbed one: parameters,
their average, the optimizer's state, metrics and sample images.

Made by `make faults`, which is `python tests/support/faults.py --report=docs/reports/faults.md`,
with `--seed={seed}`, on {datetime.date.today()}: {minutes:.0f} minutes on {os.cpu_count()} CPU
cores ({platform.machine()}, {platform.system()}, Python {platform.python_version()}, {versions}).

| | what | counted |
|---|---|---|
{lines}
**What a kill costs.** A checkpoint is written in the background while training continues. It gets
its name when all of it is on disk, and the next one begins only then. So a killed run resumes from
a checkpoint at most one interval old. If it was just writing one, it resumes from the one before.
It then repeats one interval and the steps taken during the save. These runs write checkpoints so
often that they are writing one most of the time.

**What SIGTERM costs.** Nothing, if the grace time ({GRACE:.0f} s in Kubernetes) is longer than a
step and two saves. One save may be under way, and one is the last. An evaluation stops between its
batches of 32 images, and the next start makes it. Its checkpoint is begun before it. A SIGTERM
during compilation saves nothing, but loses nothing: no step was made since the last checkpoint.

**Damage.** orbax protects its indices, and this code keeps checksums of the arrays and of the
metadata. A checkpoint that cannot be read, or is not what was written, becomes STEP.damaged, with a
warning. It is never deleted. Damage without harm is in files for other readers, such as copies of
an index.
"""
