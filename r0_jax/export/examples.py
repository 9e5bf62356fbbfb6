"""Images of a run's last evaluation, for the model card of an export."""

import warnings
from pathlib import Path
from typing import NamedTuple

from r0_jax.errors import InputError
from r0_jax.evaluation import result_table
from r0_jax.files import copy_file, loads
from r0_jax.workdir.run import Run

_COUNT = 4  # images of a card


class Example(NamedTuple):
    """One drawn image.

    Attributes:
      file: its path in the export, with slashes.
    """

    prompt: str
    file: str


def copy(run: Run, step: int, folder: Path) -> list[Example]:
    """Copy the generator's first evaluated images to `folder`/images; return what they show.

    [] where the run's last evaluation was of another checkpoint, or is not there. Raises InputError
    for an evaluation that is broken.
    """
    workdir = run.workdir.path
    if not (workdir / "eval.json").exists():
        return []
    if result_table.read_evaluation(workdir / "eval.json").get("checkpoint") != f"step {step}":
        return []
    source, listed = workdir / "samples" / "eval", []
    name = f"r0_{run.config.sampler.num_steps}"
    for i, (prompt, file) in enumerate(_drawn(source / "prompts.jsonl", name)[:_COUNT]):
        if not (source / file).exists():
            warnings.warn(f"{source / file} is missing; the model card shows less", stacklevel=2)
            continue
        example = Example(prompt, f"images/{i}.png")
        (folder / "images").mkdir(exist_ok=True)
        copy_file(source / file, folder / example.file, workdir)
        listed.append(example)
    return listed


def _drawn(path: Path, model: str) -> list[tuple[str, str]]:
    """Return (prompt, file) of each image of a model."""
    if not path.exists():
        return []
    try:
        records = [loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        return [(str(x["prompt"]), str(x["files"][model])) for x in records if model in x["files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} could not be read ({error}); evaluate again") from None
