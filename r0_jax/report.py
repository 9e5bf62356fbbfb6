"""Writes the page of a run again, or one page that compares several runs.

    python -m r0_jax.report --workdir=runs/a                                  runs/a/report.html
    python -m r0_jax.report --workdir=runs/a --workdir=runs/b --out=a_b.html

Runs may still be training. A page is one file that needs no other and no network.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import contextlib

from absl import flags

from r0_jax import cli, remote
from r0_jax.errors import InputError
from r0_jax.evaluation import report, run_comparison
from r0_jax.files import write_bytes
from r0_jax.workdir import mirror


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_paths("workdir", "folder of a run; give it several times to compare runs")
    cli.define_path("out", None, "HTML file of a comparison; default: comparison.html here")
    flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    if len(given.workdir) > run_comparison.MOST:
        raise InputError(
            f"--workdir is given {len(given.workdir)} times; {run_comparison.MOST} fit"
        )
    with contextlib.ExitStack() as held:
        folders = [held.enter_context(mirror.workdir(name)).path for name in given.workdir]
        if len(folders) == 1:
            if given.out:
                raise InputError("--out is for several --workdir; one run's page is in its folder")
            print(f"report: {report.write_report(folders[0])}")
            return
        out = remote.output(given.out or "comparison.html")
        write_bytes(out, run_comparison.write(folders))
        print(f"report: {out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
