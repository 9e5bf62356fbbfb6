"""The models of the demo's page: where they come from, and how each is drawn unless asked."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r0_jax import config as base_config
from r0_jax import remote
from r0_jax.config_check import MOST_STEPS
from r0_jax.diffusion import grid
from r0_jax.diffusion.schedulers import Scheduler
from r0_jax.errors import InputError
from r0_jax.evaluation.drawing import from_run
from r0_jax.files import is_plain_name
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.shapes import CHECKPOINTS
from r0_jax.shapes.measures import set_measures
from r0_jax.weights.network import Params
from r0_jax.workdir import checkpoint, run
from r0_jax.workdir.workdir import LocalWorkdir

_BASE = 25, 7.5  # steps and guidance of a folder of which nothing is known
_WORLD = 25, 3.0  # of the embedded world's base
# What the snippet of a model card of ours says.
_SNIPPET = re.compile(r"num_inference_steps=(\d{1,2}), guidance_scale=(\d{1,2}(?:\.\d{1,4})?)\b")


class Model(NamedTuple):
    """One column of the page.

    Attributes:
      params: of every part; `Lazy` until they are placed.
      scheduler: number of steps -> the sampler.
      steps: unless asked for others.
      guidance_scale: the same; 1 is none.
      rewards: config entries by name, of what a run is trained on and measured by.
    """

    name: str
    pipeline: Pipeline
    params: dict[str, Params]
    scheduler: Callable[[int], Scheduler]
    steps: int
    guidance_scale: float
    rewards: dict[str, Any]


def load(given: Sequence[str]) -> list[Model]:
    """Load the models of a flag, each NAME=FOLDER of a pipeline or of a run; raise InputError."""
    found: dict[str, Model] = {}
    for item in given:
        name, _, where = item.partition("=")
        if not (is_plain_name(name) and where):
            raise InputError(f"--pipelines: {item!r} should read name=folder")
        if name in found:
            raise InputError(f"--pipelines names {name} twice: give each its own name")
        folder = remote.local(where)
        is_pipeline = (folder / "model_index.json").exists()
        found[name] = of_pipeline(name, folder) if is_pipeline else of_run(name, folder)
    return list(found.values())


def of_pipeline(name: str, folder: Path) -> Model:
    """Load a diffusers folder. The card of an export of ours says how it is drawn."""
    pipeline = families.load(folder)
    steps, guidance_scale = _WORLD if folder == CHECKPOINTS / "pipeline" else _BASE
    card = folder / "README.md"
    if card.is_file() and (said := _SNIPPET.search(card.read_text("utf-8", errors="replace"))):
        if 1 <= int(said[1]) <= MOST_STEPS:
            steps = int(said[1])
            guidance_scale = max(1.0, float(said[2]) + 1 - pipeline.no_guidance)
    config = pipeline.scheduler_config
    return Model(
        name,
        pipeline,
        pipeline.params,
        lambda steps: grid.of_folder(config, steps),
        steps,
        guidance_scale,
        {},
    )


def of_run(name: str, folder: Path) -> Model:
    """Load the best checkpoint of a run, or the newest where none was measured."""
    workdir = LocalWorkdir(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is neither a diffusers folder nor the workdir of a run")
    config = run.read_config(folder)
    source = from_run(workdir)
    scheduler_config, sampler = source.pipeline.scheduler_config, config.sampler
    return Model(
        name,
        source.pipeline,
        source.params,
        lambda steps: grid.grid(scheduler_config, steps, sampler.eta),
        sampler.num_steps,
        source.guidance_scale,
        {**config.rewards, **config.heldout_rewards},
    )


def of_world(runs: Path) -> list[Model]:
    """Return the embedded world's base, guided and in 4 steps, and its newest run below `runs`."""
    measures = base_config.get_config()
    set_measures(measures)
    base = of_pipeline("base", CHECKPOINTS / "pipeline")
    base = base._replace(rewards={**measures.rewards, **measures.heldout_rewards})
    few = base._replace(name="base in 4 steps", steps=4, guidance_scale=1.0)
    newest = _newest(runs)
    return [base, few, *([of_run(f"R0: {newest.name}", newest)] if newest else [])]


def _newest(runs: Path) -> Path | None:
    """Return the workdir of the newest run of the embedded world that has a checkpoint."""
    found = []
    for path in runs.glob("**/config.json"):
        try:
            config = run.read_config(path.parent)
            steps = checkpoint.steps(LocalWorkdir(path.parent))
        except InputError:  # not of a run
            continue
        if steps and str(config.get("pretrained")) == str(CHECKPOINTS / "pipeline"):
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None
