"""Writes the table of docs/reports/scale.md: which recipe fits which TPU slice, and its limits.

    python -m benchmarks.scale --out=docs/reports/scale.md

This compiles the training steps of all recipes for all slices with the TPU compiler
(requirements-tpu.txt), without the programs of evaluations (`plan --noevaluation`). Each takes two
to eight minutes on two cores; all take two hours. Rows in runs/scale or in the document are not
compiled again. After a change of the step or of `plan`, empty the one and delete the section of the
other.
--only=sdxl compiles only rows with "sdxl" in their name, also those that the document holds.
"""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks import measure
from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.files import write_bytes
from r0_jax.plan.plan import Bounds, Memory, Plan

_RESULTS = Path("runs", "scale")
_GIB = 2**30
_HEADING = "## What fits, and what bounds it"
_WEAK = "Weak scaling"

MODELS = {"sd15": "SD 1.5, 512 px", "sdxl": "SDXL, 1024 px", "sd3": "SD3-medium, 1024 px"}
METHODS = {
    "lora-r0plus": ("LoRA R0+", "r0plus"),
    "lora-r0": ("LoRA R0", "r0"),
    "full-r0plus": ("full R0+", "r0plus,full"),
}
SLICES = {"v5e-16": 16, "v5p-8": 4, "v6e-8": 8}  # slice -> chips
WEAK = {"v5e-8": 8, "v5e-256": 256}  # slice -> chips; only the batch is split between groups of 8


class Row(NamedTuple):
    name: str
    recipe: str
    topology: str
    chips: int
    fsdp: int

    def command(self) -> list[str]:
        """Return the flags of `plan`: one image per chip, weights split over `fsdp` chips."""
        return [
            "--config=configs/" + self.recipe,
            f"--topology={self.topology}",
            f"--config.batch_size={self.chips}",
            f"--config.mesh.fsdp={self.fsdp}",
        ]


def rows() -> list[Row]:
    table = [
        Row(
            f"{model}-{method}-{name}",
            f"{model}_r0.py:{variant}",
            name,
            chips,
            chips,
        )
        for model in MODELS
        for method, (_, variant) in METHODS.items()
        for name, chips in SLICES.items()
    ]
    return table + [
        Row(f"weak-{chips}", "sdxl_r0.py:r0plus", name, chips, 8) for name, chips in WEAK.items()
    ]


def define_flags() -> None:
    cli.define_path("out", None, "Markdown file for the section; printed by default")
    flags.DEFINE_string("only", "", "compile only rows with this text in their name")


def main(argv: list[str]) -> None:
    del argv
    out, only = flags.FLAGS.out, flags.FLAGS.only
    kept = Kept.of(measure.read_section(out, _HEADING) if out else "")
    stored = {row.name for row in rows() if _read(row)}
    done = stored if only else stored | kept.rows
    wanted = [row for row in rows() if only in row.name and row.name not in done]
    if (wanted or stored) and importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is missing: pip install 'r0_jax[tpu]'")
    failed = []
    for row in wanted:
        print(row.name, flush=True)
        ended = subprocess.run(
            [sys.executable, "-m", "r0_jax.plan", "--json", "--noevaluation", *row.command()],
            stdout=subprocess.PIPE,
            check=False,
        )
        if ended.returncode == 0:
            write_bytes(_path(row), ended.stdout)
        else:
            failed.append(row.name)
    measure.publish(out, _HEADING, document(kept))
    if failed:
        raise InputError(f"these rows failed to compile, see above: {', '.join(failed)}")


class Kept(NamedTuple):
    """What a document holds already.

    Attributes:
      rows: names of the rows that its table and its sentence on weak scaling tell of.
      lines: of the table, by the name of the row.
      weak: that sentence, "" where it has none.
      machine: the last line, which says where rows were compiled.
    """

    rows: frozenset[str]
    lines: dict[str, str]
    weak: str
    machine: str

    @classmethod
    def of(cls, section: str) -> "Kept":
        """Return what a section that `document` made holds."""
        text = section.splitlines()
        lines = {
            name: line
            for name, cells in _cells().items()
            for line in text
            if line.startswith(f"| {' | '.join(cells)} |")
        }
        weak = next((line for line in text if line.startswith(_WEAK)), "")
        both = [f"weak-{chips}" for chips in WEAK.values()] if weak else []
        return cls(frozenset([*lines, *both]), lines, weak, text[-1] if text else "")


def _cells() -> dict[str, tuple[str, str, str]]:
    """Return the first cells of the table's lines, by the name of the row."""
    return {
        f"{model}-{method}-{name}": (said, how, name)
        for model, said in MODELS.items()
        for method, (how, _) in METHODS.items()
        for name in SLICES
    }


def _path(row: Row) -> Path:
    return _RESULTS / f"{row.name}.json"


def _read(row: Row) -> dict[str, Any] | None:
    """Return the result of a row; None if it is missing, incomplete, or of an older `plan`."""
    try:
        found = json.loads(_path(row).read_text("utf-8"))
        is_plan = _has(found, Plan) and _has(found["memory"], Memory)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return found if is_plan and (not found["bounds"] or _has(found["bounds"], Bounds)) else None


def _has(found: dict[str, Any], kind: type) -> bool:
    return set(found) == {field.name for field in dataclasses.fields(kind)}


def document(kept: Kept) -> str:
    """Return the table and what stands below it: rows of runs/scale, or else those of `kept`."""
    found = {row.name: read for row in rows() if (read := _read(row))}
    lines = [
        "| | | slice | a chip holds, GiB | fits | TFLOP a step | HBM, GB | sent, GB | "
        "bound by | images/s | MFU | compiled, s | host, GB |",
        "|---|---|---|---:|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, cells in _cells().items():
        if name in found:
            lines.append(_line(cells, found[name]))
        elif name in kept.lines:
            lines.append(kept.lines[name])
    weak = kept.weak
    if all(f"weak-{chips}" in found for chips in WEAK.values()):
        few, many = (
            sum(found[f"weak-{chips}"]["bounds"]["sent_bytes"].values()) for chips in WEAK.values()
        )
        weak = (
            f"{_WEAK} of SDXL LoRA R0+, with weights split over 8 chips. A chip sends "
            f"{few / 1e9:.2f} GB a step among 8 chips and {many / 1e9:.2f} GB among 256, "
            f"{many / few - 1:+.1%}."
        )
    below = (
        "One image a chip; recipes take 2 to 4 at once, unless --config.device_batch=1. "
        "Weights are split over all chips of a slice. `-`: not known."
    )
    if (done := len(found.keys() | kept.rows)) < len(rows()):
        below += (
            f" {done} of {len(rows())} programs were compiled so far: "
            "`python -m benchmarks.scale --out=docs/reports/scale.md` compiles the rest."
        )
    machine = measure.machine("jax", "libtpu") if found else kept.machine
    return "\n\n".join(filter(None, ["\n".join(lines), weak, below, machine]))


def _line(first: tuple[str, str, str], found: dict[str, Any]) -> str:
    memory, bounds = found["memory"], found["bounds"]
    cells = [
        *first,
        f"{memory['peak_bytes'] / _GIB:.1f} of {memory['limit_bytes'] / _GIB:.1f}",
        "yes" if memory["fits"] else "**no**",
        f"{found['flops_per_step'] / 1e12:,.0f}",
    ]
    if bounds:
        cells += [
            f"{bounds['hbm_bytes'] / 1e9:,.0f}",
            f"{sum(bounds['sent_bytes'].values()) / 1e9:.1f}",
            re.sub("hbm", "HBM", bounds["bound_by"]),
            f"{bounds['images_per_sec']:,.1f}",
            f"{bounds['mfu']:.0%}",
        ]
    else:
        cells += ["-"] * 5
    cells += [f"{found['compile_seconds']:.0f}", f"{found['host_bytes'] / 1e9:.1f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
