"""The pretrained weights that a run began with, known again by W/pretrained.json."""

import json
from pathlib import Path

from r0_jax.errors import InputError
from r0_jax.files import read_json, write_bytes
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.weights.network import row_fingerprint

FILE = "pretrained.json"


def keep(workdir: Path, pipeline: Pipeline) -> None:
    """Write down the fingerprint of the pipeline's generator."""
    facts = {
        "folder": str(pipeline.folder),
        "part": pipeline.generator_part,
        "fingerprint": _fingerprint(pipeline),
    }
    write_bytes(workdir / FILE, json.dumps(facts, indent=1, ensure_ascii=False).encode("utf-8"))


def is_kept(workdir: Path) -> bool:
    """Return whether the run's fingerprint is there; runs of r0_jax 0.1 have none."""
    return (workdir / FILE).is_file()


def check(workdir: Path, pipeline: Pipeline, remedy: str) -> None:
    """Compare the pipeline with the one that the run began with, if its fingerprint was kept.

    Raises InputError, which names `remedy`, where the generator's weights differ.
    """
    if is_kept(workdir) and read_json(workdir / FILE).get("fingerprint") != _fingerprint(pipeline):
        raise InputError(
            f"{pipeline.folder} does not hold the weights that {workdir} was trained on: its "
            f"{pipeline.generator_part} has changed; {remedy}, or delete {workdir / FILE} to use "
            "these weights anyway"
        )


def _fingerprint(pipeline: Pipeline) -> str:
    return row_fingerprint(pipeline.params[pipeline.generator_part])
