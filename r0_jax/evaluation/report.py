"""Shows a run on one page, report.html: its result, curves, images and configuration."""

import html
import importlib.metadata
import json
import math
import os
import platform
import re
from pathlib import Path

import jax

from r0_jax.errors import InputError
from r0_jax.evaluation import (
    curves,
    hacking,
    html_page,
    interval_plot,
    result_table,
    training_samples,
)
from r0_jax.files import Json, check_regular, loads, read_json, write_bytes

_PROMPTS_SHOWN = 12

# Prefix in metrics.jsonl, heading, label of the value axis, CSS class with the colour.
CURVES = [
    ("reward/", "Training rewards", "reward", "c1"),
    ("heldout/", "Held-out rewards", "held-out reward", "c2"),
    ("norm/x0/", "Pull of each term at x0", "L2 norm", "c3"),
    ("hacking/", "Signs of hacking", "multiple of the base", "c2"),
    ("cosine/x0/", "Agreement of terms with the rewards", "cosine", "c3"),
    ("norm/params/", "Gradient of each term", "L2 norm", "c4"),
    ("norm/", "Other norms", "L2 norm", "c4"),
    ("", "Loss, speed and the rest", "value", "c5"),
]


def write_report(workdir: str | os.PathLike) -> Path:
    """Write `workdir/report.html`, one file that needs no other; return its path.

    A section without its input says which file is missing. Raises InputError for a broken
    eval.json: a report without its numbers would look like a result.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"{workdir} is not a folder; give the --workdir of a run.")
    sections = {
        "Result": _result(workdir / "eval.json"),
        "Curves": _curves(workdir / "metrics.jsonl", workdir / "config.json"),
        "Side by side": _side_by_side(workdir / "samples" / "eval"),
        "Samples during training": training_samples.write(workdir, _grid(workdir)),
        "Configuration": _configuration(workdir / "config.json"),
        "Versions and hardware": _versions(),
    }
    page = html_page.write(f"R0: {workdir.resolve().name}", sections)
    write_bytes(workdir / "report.html", page)
    return workdir / "report.html"


def _result(path: Path) -> str:
    if not path.exists():
        return html_page.missing("eval.json", "the evaluation at the end of a run")
    evaluation = result_table.read_evaluation(path)
    models, table = result_table.rows(evaluation)
    ours = ['class="ours"' if name.startswith("r0") else "" for name in evaluation["models"]]
    head = "".join(f"<th {o}>{html.escape(m)}</th>" for o, m in zip(ours, models, strict=True))
    body = ""
    for row in table:
        cells = "".join(
            f"<td {o}>{html.escape(value)} <small>{html.escape(interval)}</small></td>"
            for o, (value, interval) in zip(ours, row.cells, strict=True)
        )
        label = re.sub(" ([↑↓])$", r"&nbsp;\1", html.escape(row.label))  # no arrow on its own line
        body += f"<tr><th>{label}</th>{cells}</tr>"
    shown = ("models", "differences")
    facts = {name: value for name, value in evaluation.items() if name not in shown}
    return f"""<p class="soft">The same prompts and noise for every model. {result_table.LEGEND}</p>
<div class="wide"><table class="result"><thead><tr><th></th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>{_differences(evaluation)}{html_page.facts(facts)}"""


def _differences(evaluation: dict) -> str:
    """Return a table of each model less the first one, or nothing where none was measured."""
    found = evaluation.get("differences")
    if not isinstance(found, dict) or not found:
        return ""
    first = result_table.label(next(iter(evaluation["models"])))
    models, table = result_table.rows({"models": found})
    head = "".join(f"<th>{html.escape(model)}</th>" for model in models)
    names = sorted({n for metrics in found.values() for n in metrics}, key=result_table.position)
    body = "".join(
        f"<tr><th>{html.escape(row.label)}</th>"
        + "".join(
            f"<td>{html.escape(value)} <small>{html.escape(interval)}</small>"
            f"{interval_plot.draw(metrics.get(name))}</td>"
            for (value, interval), metrics in zip(row.cells, found.values(), strict=True)
        )
        + "</tr>"
        for name, row in zip(names, table, strict=True)
    )
    return f"""<p class="soft">Differences to {html.escape(first)}, prompt by prompt. Lines are
95 % intervals; the upright line is no difference. Each has a scale of its own.</p>
<div class="wide"><table class="result"><thead><tr><th></th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>"""


def _curves(path: Path, config_path: Path) -> str:
    if not path.is_file():
        return html_page.missing("metrics.jsonl", "training")
    series, unreadable = curves.read(path)
    config = _fields(config_path)
    best, bounds = best_step(series, config.get("best_metric")), _bounds(config.get("veto"))
    last = max((step for values in series.values() for step in values), default=0)
    parts = [
        f"""<p class="soft">Step {last} of {html.escape(str(config.get("steps", "?")))}.
Line: mean; band: smallest to largest value in each hundredth of the run
(no band while there are fewer than 100 values); the number is where the line ends.</p>"""
    ]
    if best is not None:
        parts.append(
            f"""<p>The best checkpoint is that of step {best}, by
{html.escape(str(config["best_metric"]))}: the dotted lines.</p>"""
        )
    if bounds:
        parts.append('<p class="soft">Dashed: the bounds of config.veto.</p>')
    if unreadable:
        parts.append(
            html_page.note(f"Lines of metrics.jsonl that could not be read: {unreadable}.")
        )
    for prefix, heading, label, colour in CURVES:
        names = sorted(name for name in series if name.startswith(prefix))
        panels = "".join(
            _panel(name, series.pop(name), label, best, bounds.get(name, ())) for name in names
        )
        if not panels and prefix:
            panels = html_page.note(f"metrics.jsonl has no {prefix}… values.")
        if panels:
            parts.append(f'<h3>{heading}</h3><div class="panels {colour}">{panels}</div>')
    return "".join(parts)


def best_step(series: dict[str, dict[int, float]], metric: object) -> int | None:
    """Return the step of the highest value of a metric among those without a veto."""
    vetoed = series.get(hacking.VETOED, {})
    values = {
        step: value
        for step, value in series.get(str(metric), {}).items()
        if math.isfinite(value) and not vetoed.get(step)
    }
    return max(values, key=values.__getitem__, default=None)


def _bounds(veto: object) -> dict[str, tuple[float, ...]]:
    """Return {metric: its bounds} of the veto in a config.json, without what is not readable."""
    pairs = veto.items() if isinstance(veto, dict) else ()
    return {
        f"hacking/{name}": tuple(float(x) for x in pair if abs(x) < 1e300)  # inf is no bound
        for name, pair in pairs
        if isinstance(pair, list) and all(isinstance(x, int | float) for x in pair)
    }


def _panel(
    name: str, values: dict[int, float], label: str, best: int | None, bounds: tuple[float, ...]
) -> str:
    bad = sum(not math.isfinite(value) for value in values.values())
    note = html_page.note(f"{bad} of {len(values)} values are not finite.") if bad else ""
    chart = curves.draw(values, label, best, bounds) if bad < len(values) else ""
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{chart}{note}</figure>"


def _fields(path: Path) -> Json:
    """Return a config.json, {} where there is none that can be read: its own section says so."""
    try:
        return read_json(path)
    except (OSError, InputError):
        return {}


def _grid(workdir: Path) -> object:
    """Return the eval.grid of a run's config.json; None where it has none."""
    evaluation = _fields(workdir / "config.json").get("eval")
    return evaluation.get("grid") if isinstance(evaluation, dict) else None


def _side_by_side(folder: Path) -> str:
    if not (folder / "prompts.jsonl").exists():
        return html_page.missing("samples/eval/prompts.jsonl", "the evaluation at the end of a run")
    try:
        check_regular(folder / "prompts.jsonl")
        lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
        records = [loads(line) for line in lines if line.strip()]
        pairs = [(record["prompt"], record["files"].items()) for record in records]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return html_page.note(f"samples/eval/prompts.jsonl could not be read ({error}).")
    figures = ""
    for prompt, files in pairs[:_PROMPTS_SHOWN]:
        cells = "".join(
            f"<div>{html_page.image(folder / str(file), 256)}"
            f"<small>{html.escape(result_table.label(model))}</small></div>"
            for model, file in files
        )
        caption = f"<figcaption>{html.escape(str(prompt))}</figcaption>"
        figures += f'<figure>{caption}<div class="row">{cells}</div></figure>'
    shown = min(len(pairs), _PROMPTS_SHOWN)
    return f"""<p class="soft">The first {shown} of the {len(pairs)} prompts whose images were kept.
On each prompt every model started from the same noise.</p><div class="pairs">{figures}</div>"""


def _configuration(path: Path) -> str:
    if not path.exists():
        return html_page.missing("config.json", "the start of a run")
    try:
        check_regular(path)
        config = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return html_page.note(f"config.json could not be read ({error}).")
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<details><summary>The resolved configuration</summary><pre>{text}</pre></details>"


def _versions() -> str:
    facts = {"python": platform.python_version()}
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        facts[package] = importlib.metadata.version(package)
    kinds = [device.device_kind for device in jax.devices()]
    facts["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    facts["host"] = f"{platform.platform()}, {os.cpu_count()} CPU cores"
    return '<p class="soft">Of the process that wrote this page.</p>' + html_page.facts(facts)
