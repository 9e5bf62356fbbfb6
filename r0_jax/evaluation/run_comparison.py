"""Compares several runs on one page: results, curves, images and what their configs differ in."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r0_jax.config_check import named_fields
from r0_jax.errors import InputError
from r0_jax.evaluation import curves, html_page, report, result_table, statistics, verdicts
from r0_jax.evaluation.results import FEATURES, IMAGES, VALUES
from r0_jax.evaluation.verdicts import Values
from r0_jax.files import Json, check_regular, loads, read_json

MOST = len(curves.SEVERAL)  # runs on a page
_PROMPTS_SHOWN = 8


class Column(NamedTuple):
    """One run, as far as its folder tells."""

    name: str
    folder: Path
    config: Json
    series: dict[str, dict[int, float]]
    evaluation: Json
    values: Values


def write(folders: Sequence[Path]) -> bytes:
    """Return the page of 2 to 8 workdirs; raise InputError for one that is not a run's."""
    columns = [_column(name, path) for name, path in zip(_names(folders), folders, strict=True)]
    sections = {
        "Runs": _runs(columns),
        "Result": _result(columns),
        "Differences, prompt by prompt": _differences(columns),
        "Curves": _curves(columns),
        "What their configs differ in": _configs(columns),
        "Side by side": _side_by_side(columns),
    }
    names = " and ".join(column.name for column in columns)
    return html_page.write(f"R0: {names}", sections)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in folders]
    if len(set(parts)) < len(parts):
        raise InputError("--workdir is given twice with one folder")
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return ends


def _column(name: str, folder: Path) -> Column:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} is not the workdir of a run: it has no config.json")
    path, found = folder / "metrics.jsonl", folder / "eval.json"
    evaluation = result_table.read_evaluation(found) if found.exists() else {}
    if evaluation:
        result_table.rows(evaluation)  # or it is broken
    return Column(
        name,
        folder,
        read_json(config),
        curves.read(path)[0] if path.is_file() else {},
        evaluation,
        verdicts.read_values(folder) if (folder / VALUES).exists() else {},
    )


def _key(columns: Sequence[Column]) -> str:
    """Return which colour is which run."""
    spans = "".join(
        f'<span style="color: {colour}">{html.escape(column.name)}</span>'
        for colour, column in zip(curves.SEVERAL.values(), columns, strict=False)
    )
    return f'<p class="key">{spans}</p>'


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table of plain texts; the first cell of a row is its name."""
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    rows = "".join(
        f"<tr><th>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in body
    )
    return (
        f'<div class="wide"><table class="result"><thead><tr><th></th>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _runs(columns: Sequence[Column]) -> str:
    body = []
    for column in columns:
        last = max((step for x in column.series.values() for step in x), default=0)
        metric = column.config.get("best_metric") or "none"
        best = report.best_step(column.series, metric)
        value = "" if best is None else f"{column.series[str(metric)][best]:.4g} at step {best}"
        steps = column.config.get("steps", "?")
        body.append([column.name, f"{last} of {steps}", str(metric), value])
    return _key(columns) + _table(["step", "best metric", "its best"], body)


def _result(columns: Sequence[Column]) -> str:
    models: dict[str, Any] = {}
    for column in columns:
        for model, metrics in column.evaluation.get("models", {}).items():
            models.setdefault(column.name if model.startswith("r0") else model, metrics)
    if not models:
        return html_page.missing("eval.json", "the evaluation at the end of a run")
    labels, rows = result_table.rows({"models": models})
    body = [[row.label, *(" ".join(cell).strip() for cell in row.cells)] for row in rows]
    asked = {column.name: _noise(column) for column in columns if column.evaluation}
    absent = [column.name for column in columns if not column.evaluation]
    notes = [f"No eval.json yet: {', '.join(absent)}."] if absent else []
    if any(how != next(iter(asked.values())) for how in asked.values()):
        notes.append("The runs were measured differently: with other prompts, seeds or settings.")
    return "".join(map(html_page.note, notes)) + _table(labels, body)


def _differences(columns: Sequence[Column]) -> str:
    """Return each run less the first one, of what both measured on the same prompts and noise."""
    first, *others = columns
    same = [x for x in others if _noise(x) == _noise(first) and x.values and first.values]
    if not same:
        return html_page.note(
            "No other run was measured on the prompts and noise of the first one."
        )
    ours = _of_generator(first)
    body = []
    for metric in sorted(ours, key=result_table.position):
        cells = []
        for column in same:
            theirs = _of_generator(column).get(metric)
            cells.append("–" if theirs is None else _difference(theirs, ours[metric]))
        body.append([result_table.row_label(metric), *cells])
    told = f"Less {first.name}; 95 % intervals over prompts, not over trainings."
    return f'<p class="soft">{html.escape(told)}</p>' + _table([x.name for x in same], body)


def _noise(column: Column) -> object:
    """Return how a run was measured: its prompts, seed and settings."""
    test = column.evaluation.get("test")
    of_test = {k: x for k, x in test.items() if k != "base"} if isinstance(test, dict) else None
    return of_test, column.evaluation.get("seed"), column.evaluation.get("prompts")


def _of_generator(column: Column) -> Values:
    """Return {metric: a value a prompt} of the trained generator."""
    pairs = [(*name.partition("/"), x) for name, x in column.values.items()]
    return {
        metric: x
        for model, _, metric, x in pairs
        if model.startswith("r0")
        and metric != FEATURES
        and x.ndim == 1
        and (np.issubdtype(x.dtype, np.number) or x.dtype == bool)
    }


def _difference(theirs: np.ndarray, ours: np.ndarray) -> str:
    if theirs.shape != ours.shape or len(ours) < 2:
        return "–"
    entry = statistics.t_ci(np.asarray(theirs, np.float64) - np.asarray(ours, np.float64))
    low, high = entry["ci95"]
    return f"{entry['value']:+.4g} ({low:+.4g} to {high:+.4g})"


def _curves(columns: Sequence[Column]) -> str:
    logged = {name for column in columns for name in column.series}
    parts = [_key(columns)]
    for prefix, heading, label, _ in report.CURVES:
        names = sorted(name for name in logged if name.startswith(prefix))
        logged -= set(names)
        panels = "".join(_panel(name, columns, label) for name in names)
        if panels:
            parts.append(f'<h3>{heading}</h3><div class="panels">{panels}</div>')
    return "".join(parts) if parts[1:] else html_page.missing("metrics.jsonl", "training")


def _panel(name: str, columns: Sequence[Column], label: str) -> str:
    series = [column.series.get(name, {}) for column in columns]
    if not any(np.isfinite(list(values.values())).any() for values in series if values):
        return ""
    chart = curves.draw_several(series, label)
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{chart}</figure>"


def _configs(columns: Sequence[Column]) -> str:
    fields = [
        {name: html_page.brief(x) for name, x in named_fields(c.config) if not isinstance(x, dict)}
        for c in columns
    ]
    names = dict.fromkeys(name for found in fields for name in found)
    body = [
        [name, *(found.get(name, "–") for found in fields)]
        for name in names
        if len({found.get(name) for found in fields}) > 1 and name != "seal"
    ]
    if not body:
        return html_page.note("Nothing: their configs are the same.")
    return _table([column.name for column in columns], body)


def _side_by_side(columns: Sequence[Column]) -> str:
    every = {column.name: _drawn(column.folder / IMAGES) for column in columns}
    drawn = {name: found for name, found in every.items() if found}
    shared = [x for x in next(iter(drawn.values()), {}) if all(x in d for d in drawn.values())]
    if not shared:
        return html_page.note("No prompt of samples/eval is in several runs.")
    figures = ""
    for prompt in shared[:_PROMPTS_SHOWN]:
        cells = "".join(
            f"<div>{html_page.image(found[prompt], 256)}<small>{html.escape(name)}</small></div>"
            for name, found in drawn.items()
        )
        caption = f"<figcaption>{html.escape(prompt)}</figcaption>"
        figures += f'<figure>{caption}<div class="row">{cells}</div></figure>'
    return f'<div class="pairs">{figures}</div>'


def _drawn(folder: Path) -> dict[str, Path]:
    """Return {prompt: image} of what a run's trained generator drew at its evaluation."""
    path = folder / "prompts.jsonl"
    if not path.exists():
        return {}
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [loads(line) for line in lines if line.strip()]
        return {
            str(record["prompt"]): folder / str(file)
            for record in records
            for model, file in record["files"].items()
            if model.startswith("r0")
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} could not be read ({error}); evaluate again") from None
