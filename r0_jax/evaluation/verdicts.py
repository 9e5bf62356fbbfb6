"""Decides targets by intervals of paired differences, over the prompts and seeds of several runs.

A target compares two models that share prompts and noise: ours - factor x theirs, prompt by prompt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r0_jax import machine
from r0_jax.errors import InputError
from r0_jax.evaluation import statistics
from r0_jax.evaluation.results import FEATURES, VALUES
from r0_jax.files import check_regular

# "MODEL/METRIC" -> a value a prompt, of one seed.
Values = dict[str, np.ndarray]


class Target(NamedTuple):
    """The difference ours - factor x theirs is to lie from `least` to `most`."""

    what: str
    metric: str
    factor: float
    least: float = -np.inf
    most: float = np.inf


TARGETS = (
    Target(
        "judge accuracy at least that of the guided base, less 0.01", "judge_accuracy", 1, -0.01
    ),
    Target("Frechet distance at most 1.2 x that of the guided base", FEATURES, 1.2, most=0),
    Target("diversity at least 0.7 x that of the guided base", "diversity", 0.7, 0),
)


def read_values(folder: Path) -> Values:
    """Read the values that an evaluation wrote beside eval.json; raise InputError if it did not."""
    path = folder / VALUES
    check_regular(path)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except Exception as error:  # numpy raises any kind for a broken file
        if machine.problem(error):
            raise
        raise InputError(f"{path} is missing or not whole; evaluate again") from None


def difference(seeds: Sequence[Values], ours: str, theirs: str, target: Target) -> dict:
    """Return the mean difference over seeds with its 95 % interval, {"value", "ci95"}.

    The interval holds for other prompts and other trainings. It adds the spread over prompts, of
    which every seed has the same, and the spread over seeds.
    """
    if target.metric == FEATURES:
        arrays = [
            seed[f"{model}/{FEATURES}"] for seed in seeds for model in (ours, theirs, "reference")
        ]

        def farther(*arrays: np.ndarray) -> np.ndarray:
            return np.asarray(
                [
                    statistics.frechet_distance(a, reference)
                    - target.factor * statistics.frechet_distance(b, reference)
                    for a, b, reference in zip(*(arrays[i::3] for i in range(3)), strict=True)
                ]
            )

        entry = statistics.bootstrap_ci(lambda *x: float(farther(*x).mean()), *arrays)
        return statistics.over_seeds(entry, farther(*arrays))
    each = np.asarray(
        [
            np.asarray(seed[f"{ours}/{target.metric}"], np.float64)
            - target.factor * np.asarray(seed[f"{theirs}/{target.metric}"], np.float64)
            for seed in seeds
        ]
    )
    return statistics.over_seeds(statistics.t_ci(each.mean(axis=0)), each.mean(axis=1))


def verdict(entry: Mapping, target: Target) -> str:
    """Return "yes" or "no" where the whole interval says so, else "undecided"."""
    low, high = entry["ci95"]
    if low >= target.least and high <= target.most:
        return "yes"
    return "no" if high < target.least or low > target.most else "undecided"


def targets(seeds: Sequence[Values], ours: str, theirs: str) -> list[dict[str, Any]]:
    """Return the targets that were measured: differences with their intervals and verdicts."""
    found = []
    for target in TARGETS:
        if f"{ours}/{target.metric}" not in seeds[0]:
            continue
        entry = difference(seeds, ours, theirs, target)
        reached = verdict(entry, target)
        found.append({"what": target.what, "factor": target.factor, **entry, "reached": reached})
    return found
