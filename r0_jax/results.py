"""Train a recipe with several seeds and write docs/reports/results.md, with a picture.

    python -m r0_jax.results --config=configs/shapes_r0.py --workdir=runs/results \\
      --out=docs/reports/results.md

A killed one continues with the same command.
"""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from r0_jax import cli, remote
from r0_jax.errors import STOPPED, InputError
from r0_jax.evaluation import images, report, verdicts
from r0_jax.files import loads, write_bytes
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.training import train
from r0_jax.workdir import checkpoint, identity, mirror, run
from r0_jax.workdir.workdir import Workdir

_COLUMNS = 10  # of the picture
console = Console(stderr=True)


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_config()
    cli.define_path("workdir", None, "folder of the runs, one a seed", required=True)
    cli.define_path("out", None, "Markdown file; its picture lies beside it", required=True)
    flags.DEFINE_multi_integer("seed", [0, 1, 2], "of training and noise; may be repeated")
    flags.DEFINE_integer("num_prompts", 1000, "of test.prompts", lower_bound=2)


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    config = given.config
    if not config.test.prompts:
        raise InputError("the config has no test.prompts to measure with")
    train.enable_compilation_cache(config)
    out = remote.output(given.out)
    try:
        with StopSignal() as stop, contextlib.ExitStack() as held:
            root = given.workdir.rstrip("/")
            workdirs = [
                held.enter_context(mirror.workdir(f"{root}/seed_{seed}", training=True))
                for seed in given.seed
            ]
            with config.unlocked():
                config.test.num_prompts = given.num_prompts
            return 0 if run_all(config, given.seed, workdirs, out, stop) else STOPPED
    except Stopped:
        console.print("stopped; what was trained is saved: the same command continues")
        return STOPPED


def run_all(
    config: ConfigDict,
    seeds: Sequence[int],
    workdirs: Sequence[Workdir],
    out: Path,
    stop: StopSignal,
) -> bool:
    """Train what is not there yet, a workdir a seed, and write the page.

    Returns False if a SIGTERM ended the training.
    """
    for seed, workdir in zip(seeds, workdirs, strict=True):
        console.rule(str(workdir.path))
        with config.unlocked():
            config.seed = seed
        if not measured(workdir, config) and not train.train_and_evaluate(config, workdir, stop):
            return False
    evaluations = [report.read_evaluation(workdir.path / "eval.json") for workdir in workdirs]
    prompts = write_picture(workdirs[0].path, out.with_suffix(".png"))
    values = [verdicts.read_values(workdir.path) for workdir in workdirs]
    write_bytes(out, page(evaluations, values, out.with_suffix(".png").name, prompts).encode())
    print(f"written: {out}")
    return True


def measured(workdir: Workdir, config: ConfigDict) -> bool:
    """Return whether the workdir holds this very run, finished and measured as the config asks."""
    path = workdir.path / "eval.json"
    if config.steps not in checkpoint.steps(workdir) or not path.exists():
        return False
    identity.check_same_run(workdir, config)
    try:
        evaluation = report.read_evaluation(path)
        report.rows(evaluation)
        verdicts.read_values(workdir.path)
    except InputError:  # broken: it is measured again
        return False
    return evaluation.get("test") == config.test.to_dict() and (
        evaluation.get("seed"),
        evaluation.get("checkpoint"),
    ) == (config.seed, f"step {run.open_run(workdir).choose_step()}")


def pool(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one eval.json of several: means over the seeds.

    Intervals are joined, not narrowed, since the seeds share their prompts. A value that is null
    for one seed, since it is not finite, is null for all.
    """
    models: dict[str, Any] = {}
    for name, metrics in evaluations[0]["models"].items():
        models[name] = {}
        for metric in metrics:
            entries = [evaluation["models"][name][metric] for evaluation in evaluations]
            values = [_number(entry["value"]) for entry in entries]
            lows, highs = zip(
                *(map(_number, entry.get("ci95") or (None, None)) for entry in entries), strict=True
            )
            models[name][metric] = {
                "value": float(np.mean(values)),
                "ci95": [float(np.min(lows)), float(np.max(highs))],
            }
    return {"models": models}


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def page(
    evaluations: Sequence[dict[str, Any]],
    values: Sequence[verdicts.Values],
    picture: str,
    prompts: Sequence[str],
) -> str:
    """Return docs/reports/results.md: the table, targets, seeds, picture, and how it was made."""
    pooled = pool(evaluations)
    names = list(pooled["models"])
    seeds = ", ".join(str(evaluation["seed"]) for evaluation in evaluations)
    listed = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, start=1))
    return f"""# Results

{evaluations[0]["prompts"]} test prompts that neither the base nor R0 was trained on. Training and
noise have the seeds {seeds}. Every model of a seed has the same prompts and noise. Values are means
over the seeds; ± reaches to the farther end of all seeds' 95 % intervals.

{report.markdown_table(pooled)}
## Targets

Differences are paired: the same prompt and noise for both models. The interval holds for other
prompts and for other trainings. "Undecided" means that it holds values of both sides.

{verdicts.table(values, names[-1], names[0])}
## Side by side

Rows: {", ".join(report.label(name) for name in names)}. Each column has one prompt and one noise.

![{len(prompts)} prompts, drawn by each model]({picture})

{listed}

## How this was made

    {shlex.join(["python", "-m", "r0_jax.results", *sys.argv[1:]])}

{versions()}
"""


def write_picture(folder: Path, picture: Path) -> list[str]:
    """Write a picture of a run's samples/eval, a row a model and a column a prompt.

    Returns the prompts.
    """
    path = folder / "samples" / "eval" / "prompts.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [loads(line) for line in lines[:_COLUMNS] if line]
        named = [(record["prompt"], dict(record["files"])) for record in records]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}); evaluate again") from None
    drawn = [
        images.load_png(folder / "samples" / "eval" / files[model])
        for model in named[0][1]
        for _, files in named
    ]
    images.save_png(picture, images.grid(np.stack(drawn), columns=len(named), pad=4))
    return [prompt for prompt, _ in named]


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


if __name__ == "__main__":
    define_flags()
    cli.run(main)
