"""The Markdown page of an ablation: tables, verdicts, curves' picture, and how it was made."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from r0_jax.ablation import measured
from r0_jax.ablation.measured import Measured
from r0_jax.errors import InputError
from r0_jax.evaluation import images, report, statistics, verdicts
from r0_jax.evaluation.results import FEATURES
from r0_jax.evaluation.verdicts import Target, Values
from r0_jax.files import loads

_COLUMNS = 10  # of the picture
# What the variants are compared in. Reading many differences at once, some look real by chance.
_COMPARED = (
    Target("judge accuracy", "judge_accuracy", 1),
    Target("held-out CLIP score", "heldout_clip_score", 1),
    Target("diversity", "diversity", 1),
    Target("Frechet distance", FEATURES, 1),
)


def write(config: ConfigDict, found: Sequence[Measured], folders: Sequence[Path], out: Path) -> str:
    """Write the picture of the first seed beside `out`, and return the page.

    `folders` are the workdirs of `found`.
    """
    first = [
        (one, path)
        for one, path in zip(found, folders, strict=True)
        if one.cell.seed == found[0].cell.seed
    ]
    prompts = write_picture(first, out.with_suffix(".png"))
    columns = measured.columns(found)
    pooled = {"models": {name: measured.pool(seeds) for name, seeds in columns.items()}}
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(one.cell.seed for one in found))
    values, variants = measured.by_seed(found), [name for name, _ in config.variants]
    guided = next(iter(columns))
    listed = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, start=1))
    return f"""# Results

{found[0].evaluation["prompts"]} test prompts that neither the base nor a variant was trained on.
Training and noise have the seeds {seeds}. Every model of a seed has the same prompts and noise.
Values are means over the seeds; ± reaches to the farther end of all seeds' 95 % intervals.

{report.markdown_table(pooled)}
## Targets

Differences are paired: the same prompt and noise for both models. The interval holds for other
prompts and for other trainings. "Undecided" means that it holds values of both sides.

{verdicts.table(values, variants[0], guided)}
{_comparison(values, variants)}## The variants

{_variants(config)}
## Side by side

Rows: {", ".join(map(report.label, columns))}. Each column has one prompt and one noise.

![{len(prompts)} prompts, drawn by each model]({out.with_suffix(".png").name})

{listed}

## How this was made

    {shlex.join(["python", "-m", "r0_jax.ablate", *sys.argv[1:]])}

{versions()}
"""


def _comparison(values: Sequence[Values], variants: Sequence[str]) -> str:
    """Return the section that compares each variant with the first; "" for a single variant."""
    first, *others = variants
    rows = []
    for other in others:
        for target in _COMPARED:
            names = [f"{name}/{target.metric}" for name in (other, first)]
            both = [seed for seed in values if all(name in seed for name in names)]
            if both:
                rows.append((other, target, verdicts.difference(both, other, first, target)))
    if not rows:
        return ""
    adjusted = statistics.holm([statistics.p_value(entry) for _, _, entry in rows])
    lines = [f"| variant | metric | less {first} | 95 % interval | p (Holm) |"]
    lines.append("|---|---|---:|---:|---:|")
    for (other, target, entry), p in zip(rows, adjusted, strict=True):
        low, high = entry["ci95"]
        lines.append(
            f"| {other} | {target.what} | {entry['value']:+.4f} | {low:+.4f} to {high:+.4f} | "
            f"{p:.3f} |"
        )
    table = "\n".join(lines)
    return f"""## The variants beside {first}

The same pairs. p is adjusted for reading all rows together.

{table}

"""


def _variants(config: ConfigDict) -> str:
    """Return a list of what each variant changes in the recipe."""
    return "".join(
        f"- **{name}**: `{config.recipe}`"
        + "".join(f", `{override}`" for override in overrides)
        + "\n"
        for name, overrides in config.variants
    )


def write_picture(runs: Sequence[tuple[Measured, Path]], picture: Path) -> list[str]:
    """Write a picture of some runs' samples/eval, a row a model and a column a prompt.

    Returns the prompts.
    """
    rows, prompts = [], []
    for _, folder in runs:
        samples = folder / "samples" / "eval"
        path = samples / "prompts.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            records = [loads(line) for line in lines[:_COLUMNS] if line]
            named = [(record["prompt"], dict(record["files"])) for record in records]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({error}); evaluate again") from None
        prompts = prompts or [prompt for prompt, _ in named]
        rows += [
            [images.load_png(samples / files[model]) for _, files in named] for model in named[0][1]
        ]
    # The first run has the bases and its own generator, the others theirs: the table's columns.
    drawn = [image for row in rows for image in row]
    images.save_png(picture, images.grid(np.stack(drawn), columns=len(prompts), pad=4))
    return prompts


def versions() -> str:
    """Return one line about packages and hardware."""
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "numpy")
    )
    device = jax.devices()[0]
    return (
        f"Python {platform.python_version()}, {packages}; {jax.device_count()} × "
        f"{device.device_kind} device, {os.cpu_count()} CPU cores ({platform.machine()})."
    )
