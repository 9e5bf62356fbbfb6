"""Writes the table of docs/reports/scale.md: which recipe fits which TPU slice, and its limits.

    python -m benchmarks.scale --out=docs/reports/scale.md

This compiles the training steps of all recipes for all slices with the TPU compiler
(requirements-tpu.txt). Each takes two to eight minutes on two cores; all take two hours. Results
in runs/scale are not computed again: empty it after a change of the step or of `plan`.
--only=sdxl compiles only rows with "sdxl" in their name.
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
from r0_jax.plan.predict import Plan

_RESULTS = Path("runs", "scale")
_GIB = 2**30

MODELS = {"sd15": "SD 1.5, 512 px", "sdxl": "SDXL, 1024 px", "sd3": "SD3-medium, 1024 px"}
METHODS = {
    "lora-r0plus": ("LoRA R0+", "r0plus"),
    "lora-r0": ("LoRA R0", ""),
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
            f"{model}_r0.py" + (variant and f":{variant}"),
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
    flags.DEFINE_string("out", None, "Markdown file for the section; printed by default")
    flags.DEFINE_string("only", "", "compile only rows with this text in their name")


def main(argv: list[str]) -> None:
    del argv
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is missing: pip install -r requirements-tpu.txt")
    failed = []
    for row in rows():
        if flags.FLAGS.only in row.name and not _read(row):
            print(row.name, flush=True)
            ended = subprocess.run(
                [sys.executable, "-m", "r0_jax.plan", "--json", *row.command()],
                stdout=subprocess.PIPE,
                check=False,
            )
            if ended.returncode == 0:
                write_bytes(_path(row), ended.stdout)
            else:
                failed.append(row.name)
    measure.publish(flags.FLAGS.out, "## What fits, and what bounds it", document())
    if failed:
        raise InputError(f"these rows failed to compile, see above: {', '.join(failed)}")


def _path(row: Row) -> Path:
    return _RESULTS / f"{row.name}.json"


def _read(row: Row) -> dict[str, Any] | None:
    """Return the result of a row; None if it is missing, incomplete, or of an older `plan`."""
    try:
        found = json.loads(_path(row).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if set(found) == {field.name for field in dataclasses.fields(Plan)} else None


def document() -> str:
    """Return the tables of all compiled rows."""
    found = {row.name: read for row in rows() if (read := _read(row))}
    lines = [
        "| | | slice | a chip holds, GiB | fits | TFLOP a step | HBM, GB | sent, GB | "
        "bound by | images/s | MFU | compiled, s | host, GB |",
        "|---|---|---|---:|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for model, said in MODELS.items():
        for method, (how, _) in METHODS.items():
            lines += [
                _line(said, how, name, found[key])
                for name in SLICES
                if (key := f"{model}-{method}-{name}") in found
            ]
    text = "\n".join(lines)
    if all(f"weak-{chips}" in found for chips in WEAK.values()):
        few, many = (found[f"weak-{chips}"]["collective_bytes"] for chips in WEAK.values())
        text += (
            "\n\nWeak scaling of SDXL LoRA R0+, with weights split over 8 chips. A chip sends "
            f"{few / 1e9:.2f} GB a step among 8 chips and {many / 1e9:.2f} GB among 256, "
            f"{many / few - 1:+.1%}."
        )
    text += (
        "\n\nOne image a chip; recipes take 2 to 4 at once, unless --config.device_batch=1. "
        "Weights are split over all chips of a slice. `-`: not known."
    )
    if len(found) < len(rows()):
        text += (
            f" {len(found)} of {len(rows())} programs were compiled so far: "
            "`python -m benchmarks.scale --out=docs/reports/scale.md` compiles the rest."
        )
    return text + f"\n\n{measure.machine('jax', 'libtpu')}"


def _line(model: str, how: str, name: str, found: dict[str, Any]) -> str:
    memory = (
        f"{found['peak_bytes_per_chip'] / _GIB:.1f} of {found['hbm_bytes_per_chip'] / _GIB:.1f}"
    )
    cells = [
        model,
        how,
        name,
        memory,
        "yes" if found["fits"] else "**no**",
        f"{found['flops_per_step'] / 1e12:,.0f}",
    ]
    if found["seconds"]:
        cells += [
            f"{found['bytes_accessed'] / 1e9:,.0f}",
            f"{found['collective_bytes'] / 1e9:.1f}",
            re.sub("hbm", "HBM", found["bound_by"]),
            f"{found['predicted_images_per_sec']:,.1f}",
            f"{found['predicted_mfu']:.0%}",
        ]
    else:
        cells += ["-"] * 5
    cells += [f"{found['compile_seconds']:.0f}", f"{found['host_bytes'] / 1e9:.1f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
