"""What an ablation found, as one JSON file from which its page is made.

recipe, variants, seeds, prompts    what was run
models       {column: [{metric: {"value", "ci95"}} of each seed]}, the bases first
targets      of the first variant beside the guided base: paired differences and verdicts
differences  of the other variants from the first: paired, p adjusted for reading all (Holm)
curves       {variant: [{metric: [[step, value], ...]} of each seed]}
shown        rows and prompts of the picture
made_by      the command, packages and hardware
"""

import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from r0_jax.ablation import measured
from r0_jax.ablation.measured import Measured
from r0_jax.errors import InputError
from r0_jax.evaluation import curves, statistics, verdicts
from r0_jax.evaluation.results import FEATURES
from r0_jax.evaluation.verdicts import Target, Values
from r0_jax.files import Json, check_regular, loads

# What the variants are compared in. Reading many differences at once, some look real by chance.
_COMPARED = (
    Target("judge accuracy", "judge_accuracy", 1),
    Target("held-out CLIP score", "heldout_clip_score", 1),
    Target("diversity", "diversity", 1),
    Target("Frechet distance", FEATURES, 1),
)
_CURVES = ("heldout/", "reward/", "hacking/", "norm/x0/", "cosine/x0/")
_POINTS = 20  # of a curve
_FIELDS = ("recipe", "variants", "seeds", "models", "targets", "differences", "curves", "made_by")


def collect(config: ConfigDict, found: Sequence[Measured], folders: Sequence[Path]) -> Json:
    """Return the results of an ablation; `folders` are the workdirs of `found`."""
    values, variants = measured.by_seed(found), [name for name, _ in config.variants]
    columns = measured.columns(found)
    return {
        "recipe": config.recipe,
        "variants": [[name, list(overrides)] for name, overrides in config.variants],
        "seeds": list(dict.fromkeys(one.cell.seed for one in found)),
        "prompts": found[0].evaluation["prompts"],
        "models": columns,
        "targets": verdicts.targets(values, variants[0], next(iter(columns))),
        "differences": _differences(values, variants),
        "curves": _curves(found, folders),
        "made_by": {
            "command": shlex.join(["python", "-m", "r0_jax.ablate", *sys.argv[1:]]),
            "versions": versions(),
        },
    }


def read(path: Path) -> Json:
    """Read a results file; raise InputError unless it is whole."""
    check_regular(path)
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not the results file of an ablation ({error})") from None
    named = found if isinstance(found, dict) else {}
    missing = [name for name in _FIELDS if name not in named]
    if not missing and not found["models"]:
        missing = ["models"]
    if missing:
        raise InputError(f"{path} is not the results file of an ablation: no {missing[0]}")
    return found


def _differences(values: Sequence[Values], variants: Sequence[str]) -> list[Json]:
    """Return how each other variant differs from the first one, in each compared metric."""
    first, *others = variants
    found = []
    for other in others:
        for target in _COMPARED:
            names = [f"{name}/{target.metric}" for name in (other, first)]
            both = [seed for seed in values if all(name in seed for name in names)]
            if both:
                entry = verdicts.difference(both, other, first, target)
                found.append({"variant": other, "metric": target.what, **entry})
    adjusted = statistics.holm([statistics.p_value(entry) for entry in found])
    return [entry | {"p_holm": float(p)} for entry, p in zip(found, adjusted, strict=True)]


def _curves(found: Sequence[Measured], folders: Sequence[Path]) -> dict[str, list[Json]]:
    """Return what each run logged of the metrics that a page shows."""
    table: dict[str, list[Json]] = {}
    for one, folder in zip(found, folders, strict=True):
        series, _ = curves.read(folder / "metrics.jsonl")
        table.setdefault(one.cell.variant, []).append(
            {name: _points(x) for name, x in series.items() if name.startswith(_CURVES)}
        )
    return table


def _points(series: Mapping[int, float]) -> list[list[float]]:
    """Return [step, value] of a curve, as means over at most 20 parts, in four digits."""
    steps = np.array([step for step, value in sorted(series.items()) if math.isfinite(value)])
    parts = np.array_split(steps, min(len(steps), _POINTS)) if len(steps) else []
    return [
        [float(part.mean()), float(f"{np.mean([series[int(step)] for step in part]):.4g}")]
        for part in parts
    ]


def versions() -> str:
    """Return one line about packages and hardware."""
    packages = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax", "numpy")
    )
    device = jax.devices()[0]
    return (
        f"Python {platform.python_version()}, {packages}; {jax.device_count()} × "
        f"{device.device_kind} device, {os.cpu_count()} CPU cores ({platform.machine()})."
    )


def pooled(results: Mapping[str, Any]) -> Json:
    """Return the table of results as result_table.markdown_table takes it: means over the seeds."""
    return {"models": {name: measured.pool(x) for name, x in results["models"].items()}}
