"""Train variants of a recipe with several seeds, and write a page that compares them.

    python -m r0_jax.ablate --config=configs/ablations/shapes.py --workdir=runs/results \\
      --out=docs/reports/results.md

A killed one continues with the same command. `--jobs=8` spreads the runs over eight GPUs or TPU
chips of a host. `--only=VARIANT/seed_N` trains one run of the grid, for job queues.

results.json beside the page holds all that the page says. `--results=docs/reports/results.json`
writes the page again without the runs.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import contextlib
import json
import sys
from pathlib import Path

from absl import flags
from rich.console import Console

from r0_jax import cli, compilation_cache, remote
from r0_jax.ablation import grid, measured, page, results, training_curves, workers
from r0_jax.ablation.grid import Cell
from r0_jax.errors import STOPPED, InputError
from r0_jax.files import Json, write_bytes
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.training import train
from r0_jax.workdir import mirror
from r0_jax.workdir.workdir import Workdir

console = Console(stderr=True)


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_config(required=False)
    cli.define_path("workdir", None, "folder of the runs, VARIANT/seed_N each")
    cli.define_path("out", None, "Markdown file; results and pictures lie beside it", required=True)
    cli.define_path("results", None, "results file: write its page alone, without the runs")
    flags.DEFINE_integer("jobs", 1, "runs at a time, each on a device of its own", lower_bound=1)
    flags.DEFINE_string("only", None, "the one run to train, VARIANT/seed_N; writes no page")


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    out = remote.output(given.out)
    if out.suffix in (".json", ".png"):
        raise InputError(f"--out={given.out}: give a .md file; {out.suffix} files lie beside it")
    if given.results:
        path = remote.local(given.results)
        try:
            return write(out, results.read(path))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is not whole ({error!r}): take the copy of its ablation"
            ) from None
    if given.config is None or given.workdir is None:
        raise InputError("give --config and --workdir, or --results alone")
    cells = grid.cells(given.config)
    if given.only:
        cells = [only(cells, given.only)]
    root = given.workdir.rstrip("/")
    try:
        with StopSignal() as stop, contextlib.ExitStack() as held:
            if given.jobs > 1 and not given.only:
                ended = workers.run(cells, given.jobs, sys.argv[1:])
            else:
                ended = all(run(cell, root, stop) for cell in cells)
            if not ended:
                return STOPPED
            if given.only:
                return 0
            workdirs = [held.enter_context(opened(root, cell)) for cell in cells]
            found = [measured.read(cell, at) for cell, at in zip(cells, workdirs, strict=True)]
            folders = [workdir.path for workdir in workdirs]
            collected = results.collect(given.config, found, folders)
            of_first_seed = folders[: len(given.config.variants)]
            collected["shown"] = page.write_picture(of_first_seed, out.with_suffix(".png"))
            text = json.dumps(collected, ensure_ascii=False)
            write_bytes(out.with_suffix(".json"), text.encode())
            return write(out, collected)
    except Stopped:
        console.print("stopped; what was trained is saved: the same command continues")
        return STOPPED


def write(out: Path, found: Json) -> int:
    """Write the page of results and the picture of their curves; return the exit status."""
    picture, curves = out.with_suffix(".png"), out.with_suffix(".curves.png")
    if drawn := training_curves.draw(found["curves"]):
        write_bytes(curves, drawn)
    text = page.write(found, picture.name if picture.exists() else "", curves.name if drawn else "")
    write_bytes(out, text.encode())
    print(f"written: {out}")
    return 0


def only(cells: list[Cell], name: str) -> Cell:
    """Return the cell of a name; raise InputError where there is none."""
    for cell in cells:
        if cell.name == name:
            return cell
    known = ", ".join(cell.name for cell in cells)
    raise InputError(f"--only={name} is not a run of this ablation; they are {known}")


def opened(root: str, cell: Cell) -> contextlib.AbstractContextManager[Workdir]:
    """Open the workdir of a cell."""
    return mirror.workdir(f"{root}/{cell.name}", training=True)


def run(cell: Cell, root: str, stop: StopSignal) -> bool:
    """Train and measure a cell unless that is done; return False if a SIGTERM ended it."""
    console.rule(cell.name)
    compilation_cache.keep(cell.config.compilation_cache)
    with opened(root, cell) as workdir:
        done = measured.is_measured(workdir, cell.config)
        return done or train.train_and_evaluate(cell.config, workdir, stop)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
