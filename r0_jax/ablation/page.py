"""The Markdown page of an ablation and its two pictures, from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r0_jax.ablation import results as results_file
from r0_jax.errors import InputError
from r0_jax.evaluation import images, result_table
from r0_jax.files import loads

_COLUMNS = 10  # of the picture


def write(results: Mapping[str, Any], picture: str, curves: str) -> str:
    """Return the page; `picture` and `curves` are the names of pictures beside it, or ""."""
    pooled = results_file.pooled(results)
    first, seeds = results["variants"][0][0], ", ".join(map(str, results["seeds"]))
    return f"""# Results

{results["prompts"]} test prompts that neither the base nor a variant was trained on.
Training and noise have the seeds {seeds}. Every model of a seed has the same prompts and noise.
Values are means over the seeds; ± reaches to the farther end of all seeds' 95 % intervals.

{result_table.markdown_table(pooled)}
## Targets

Differences are paired: the same prompt and noise for both models. The interval holds for other
prompts and for other trainings. "Undecided" means that it holds values of both sides.

{_targets(results["targets"])}
{_differences(results["differences"], first)}## The variants

{_variants(results)}
{_training(curves)}{_side_by_side(results, picture)}## How this was made

    {results["made_by"]["command"]}

{results["made_by"]["versions"]}
"""


def _targets(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| target | difference | 95 % interval | reached |", "|---|---:|---:|---|"]
    for entry in entries:
        factor = "" if entry["factor"] == 1 else f" (ours - {entry['factor']:g} x theirs)"
        lines.append(
            f"| {entry['what']}{factor} | {entry['value']:+.4f} | {_interval(entry)} | "
            f"{entry['reached']} |"
        )
    return "\n".join(lines) + "\n"


def _differences(entries: Sequence[Mapping[str, Any]], first: str) -> str:
    """Return the section that compares each variant with the first; "" for a single variant."""
    if not entries:
        return ""
    lines = [f"| variant | metric | less {first} | 95 % interval | p (Holm) |"]
    lines.append("|---|---|---:|---:|---:|")
    lines += [
        f"| {entry['variant']} | {entry['metric']} | {entry['value']:+.4f} | {_interval(entry)} | "
        f"{entry['p_holm']:.3f} |"
        for entry in entries
    ]
    table = "\n".join(lines)
    return f"""## The variants beside {first}

The same pairs. p is adjusted for reading all rows together.

{table}

"""


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{low:+.4f} to {high:+.4f}"


def _variants(results: Mapping[str, Any]) -> str:
    """Return a list of what each variant changes in the recipe."""
    return "".join(
        f"- **{name}**: `{results['recipe']}`"
        + "".join(f", `{override}`" for override in overrides)
        + "\n"
        for name, overrides in results["variants"]
    )


def _training(curves: str) -> str:
    if not curves:
        return ""
    return f"""## Over training

Lines are means over the seeds; bands reach from the lowest to the highest seed.

![Held-out rewards, training rewards, signs of hacking and pulls over the steps]({curves})

"""


def _side_by_side(results: Mapping[str, Any], picture: str) -> str:
    if not picture:
        return ""
    rows, prompts = ", ".join(map(result_table.label, results["models"])), results["shown"]
    listed = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, start=1))
    return f"""## Side by side

Rows: {rows}. Each column has one prompt and one noise.

![{len(prompts)} prompts, drawn by each model]({picture})

{listed}

"""


def write_picture(folders: Sequence[Path], picture: Path) -> list[str]:
    """Write a picture of some runs' samples/eval, a row a model and a column a prompt.

    Returns the prompts.
    """
    rows, prompts = [], []
    for folder in folders:
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
