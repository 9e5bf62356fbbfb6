"""What the runs of an ablation measured, read from their workdirs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from r0_jax.ablation.grid import Cell
from r0_jax.errors import InputError
from r0_jax.evaluation import result_table, verdicts
from r0_jax.evaluation.verdicts import Values
from r0_jax.workdir import checkpoint, identity, run
from r0_jax.workdir.workdir import Workdir


class Measured(NamedTuple):
    """One run's result.

    Attributes:
      evaluation: the contents of its eval.json.
      values: those of its eval_values.npz.
    """

    cell: Cell
    evaluation: dict[str, Any]
    values: Values


def is_measured(workdir: Workdir, config: ConfigDict) -> bool:
    """Return whether the workdir holds this very run, finished and measured as the config asks."""
    path = workdir.path / "eval.json"
    ended = config.early_stop or config.steps in checkpoint.steps(workdir)
    if not ended or not path.exists():
        return False
    identity.check_same_run(workdir, config)
    try:
        evaluation = result_table.read_evaluation(path)
        result_table.rows(evaluation)
        verdicts.read_values(workdir.path)
    except InputError:  # broken: it is measured again
        return False
    return evaluation.get("test") == config.test.to_dict() and (
        evaluation.get("seed"),
        evaluation.get("checkpoint"),
    ) == (config.seed, f"step {run.open_run(workdir).choose_step()}")


def read(cell: Cell, workdir: Workdir) -> Measured:
    """Return the result of a run that is measured."""
    evaluation = result_table.read_evaluation(workdir.path / "eval.json")
    return Measured(cell, evaluation, verdicts.read_values(workdir.path))


def columns(found: Sequence[Measured]) -> dict[str, list[dict[str, Any]]]:
    """Return {column of the table: its metrics, {name: entry}, of each seed}.

    The bases stand first; the runs of the first variant measured them. A variant's own column is
    its trained generator, and has the variant's name.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    for name in ("bases", "trained"):
        for one in found:
            for model, metrics in one.evaluation["models"].items():
                trained = model.startswith("r0_")
                if trained == (name == "trained"):
                    table.setdefault(one.cell.variant if trained else model, []).append(metrics)
    return table


def pool(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics of one column, {name: {"value", "ci95"}}: means over the seeds.

    Intervals are joined, not narrowed, since the seeds share their prompts. A value that is null
    for one seed, since it is not finite, is null for all.
    """
    pooled = {}
    for metric in seeds[0]:
        entries = [metrics[metric] for metrics in seeds]
        values = [_number(entry["value"]) for entry in entries]
        lows, highs = zip(
            *(map(_number, entry.get("ci95") or (None, None)) for entry in entries), strict=True
        )
        pooled[metric] = {
            "value": float(np.mean(values)),
            "ci95": [float(np.min(lows)), float(np.max(highs))],
        }
    return pooled


def by_seed(found: Sequence[Measured]) -> list[Values]:
    """Return, of each seed, "COLUMN/METRIC" -> a value a prompt, with the columns of `columns`."""
    seeds: dict[int, Values] = {}
    for one in found:
        values = seeds.setdefault(one.cell.seed, {})
        for name, array in one.values.items():
            model, _, metric = name.partition("/")
            column = one.cell.variant if model.startswith("r0_") else model
            values[f"{column}/{metric}"] = array
    return list(seeds.values())


def _number(value: float | None) -> float:
    return np.nan if value is None else value
