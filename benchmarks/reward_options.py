"""Measures the options of combining rewards on the embedded world: accuracy and hacking.

    python -m benchmarks.reward_options --workdir=runs/reward_options --out=docs/reports/rewards.md

This runs the recipe for `--steps` steps, unchanged and once per option. It then judges images of
validation prompts. Finished runs are not repeated; interrupted runs resume.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import measure
from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.shapes import PROMPTS

HEADING = "## Options of combining rewards"
# Changes of the recipe, by option.
OPTIONS = {
    "as in the recipe": [],
    "plain sum": ["objective.normalization=none"],
    "running spread": ["objective.normalization=running_std"],
    "conflicts projected": ["objective.conflicts=project"],
    "caps at the guided base's scores": [
        "rewards.clip_score.cap=0.949",
        "rewards.preference.cap=0.630",
    ],
    "sharpness 0.01": ["objective.sharpness=0.01"],
}
_BASE = "base_25_guided"
_SIGNS = ("saturation", "contrast", "grid_energy_6")


def define_flags() -> None:
    cli.define_path("workdir", "runs/reward_options", "folder of the runs")
    cli.define_path("out", None, "document for the section; printed by default")
    flags.DEFINE_integer("steps", 100, "of each run", lower_bound=1)
    flags.DEFINE_integer("num_prompts", 300, "number of validation prompts to judge", lower_bound=2)


def finished(folder: Path, changes: list[str]) -> dict[str, Any]:
    """Finish the run with `r0_jax.main` if needed; return its eval.json."""
    given = flags.FLAGS
    settings = [
        f"steps={given.steps}",
        f"test.num_prompts={given.num_prompts}",
        f"test.prompts={PROMPTS / 'validation.txt'}",
        f"eval_every={given.steps}",
        "best_metric=",
        *changes,
    ]
    if not (folder / "eval.json").is_file():
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "r0_jax.main",
                "--config=configs/shapes_r0.py",
                f"--workdir={folder}",
                *[f"--config.{setting}" for setting in settings],
            ]
        )
        if done.returncode:
            raise InputError(f"the run in {folder} failed: see above")
    return json.loads((folder / "eval.json").read_text("utf-8"))


def row(name: str, model: dict[str, Any], signs: dict[str, float]) -> list[str]:
    def value(metric: str, digits: int = 3) -> str:
        return f"{model[metric]['value']:.{digits}f}"

    low, high = model["judge_accuracy"]["ci95"]
    return [
        name,
        f"{value('judge_accuracy')} ± {(high - low) / 2:.3f}",
        value("reward/clip_score"),
        value("reward/preference"),
        value("heldout_clip_score"),
        value("frechet_distance", 4),
        value("diversity"),
        *[f"{signs[sign]:.2f}" if sign in signs else "" for sign in _SIGNS],
    ]


def last_signs(folder: Path) -> dict[str, float]:
    """Return the hacking signs of the last evaluation, relative to images of the base model."""
    found: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        found |= {
            name.removeprefix("hacking/"): value
            for name, value in json.loads(line).items()
            if name.startswith("hacking/")
        }
    return found


def main(argv: list[str]) -> None:
    del argv
    given, rows = flags.FLAGS, []
    for name, changes in OPTIONS.items():
        folder = Path(given.workdir, name.replace(" ", "_").replace("'", ""))
        models = finished(folder, changes)["models"]
        if not rows:
            rows = [
                row(base, models[key], {})
                for base, key in (("base, 25 steps, guided", _BASE), ("base, 4 steps", "base_4"))
            ]
        rows.append(row(f"R0, 4 steps, {name}", models["r0_4"], last_signs(folder)))
    header = [
        "",
        "judge accuracy",
        "clip_score",
        "preference",
        "held-out CLIP",
        "Frechet",
        "diversity",
        *[sign.replace("_", " ") for sign in _SIGNS],
    ]
    changed = "\n".join(
        f"- {name}: `{' '.join(f'--config.{x}' for x in changes)}`"
        for name, changes in OPTIONS.items()
        if changes
    )
    flags_given = f"{measure.given_flags()} --out=docs/reports/rewards.md"
    text = f"""    python -m benchmarks.reward_options {flags_given}

{given.steps} steps of `configs/shapes_r0.py` each, which itself takes more, and
{given.num_prompts} validation prompts; ± is half a 95 % interval. The last columns are signs
of hacking: saturation, contrast, and energy in step with the 6 x 6 patches of clip_score's
vision transformer. They are multiples of the base's images in 4 steps: 1 is no change.

{measure.table(header, rows)}

{changed}

{measure.machine("jax")} Seed 0."""
    measure.publish(given.out, HEADING, text)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
