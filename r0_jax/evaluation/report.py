"""Shows a run's result: a table in the terminal or in Markdown, and report.html, one whole page."""

import base64
import html
import importlib.metadata
import io
import json
import math
import os
import platform
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jax
import rich.box
import rich.console
import rich.table
import rich.text
from PIL import Image

from r0_jax.errors import InputError
from r0_jax.evaluation import curves, hacking
from r0_jax.evaluation.images import load_png, to_uint8
from r0_jax.files import Json, check_regular, loads, read_json, write_bytes

_PROMPTS_SHOWN = 12
_GRIDS_SHOWN = 6

_MODELS = {
    "base_25_guided": "base, 25 steps, guided",
    "base_4": "base, 4 steps",
    "r0_4": "R0, 4 steps",
}
# The table's rows, in order; the arrow says which way is better. A name that ends in "/" stands for
# every metric that starts with it.
_METRICS = {
    "judge_accuracy": ("judge accuracy", "↑"),
    "judge_accuracy_en": ("judge: English", "↑"),
    "judge_accuracy_zh": ("judge: Chinese", "↑"),
    "judge_presence": ("judge: presence", "↑"),
    "judge_colour": ("judge: colour", "↑"),
    "judge_shape": ("judge: shape", "↑"),
    "judge_size": ("judge: size", "↑"),
    "judge_relation": ("judge: relation", "↑"),
    "heldout_clip_score": ("held-out CLIP score", "↑"),
    "frechet_distance": ("Frechet distance", "↓"),
    "frechet_floor": ("Frechet distance of two rendered sets", ""),
    "cmmd": ("CMMD to the reference", "↓"),
    "cmmd_floor": ("CMMD of two parts of the reference", ""),
    "frechet_clip": ("Frechet distance of CLIP features", "↓"),
    "frechet_clip_floor": ("Frechet distance of two parts", ""),
    "diversity": ("diversity", "↑"),
    "reward/": ("reward:", "↑"),
    "hpsv2/": ("HPSv2 benchmark:", "↑"),
    "sign/": ("sign of hacking:", ""),
    "network_calls": ("network calls", "↓"),
    "seconds_per_image": ("seconds per image", "↓"),
}
_LEGEND = "±: farther end of the 95 % interval. ↑: larger is better, ↓: smaller."
# Prefix in metrics.jsonl, heading, label of the value axis, CSS class with the colour.
_CURVES = [
    ("reward/", "Training rewards", "reward", "c1"),
    ("heldout/", "Held-out rewards", "held-out reward", "c2"),
    ("norm/x0/", "Pull of each term at x0", "L2 norm", "c3"),
    ("hacking/", "Signs of hacking", "multiple of the base", "c2"),
    ("cosine/x0/", "Agreement of terms with the rewards", "cosine", "c3"),
    ("norm/params/", "Gradient of each term", "L2 norm", "c4"),
    ("norm/", "Other norms", "L2 norm", "c4"),
    ("", "Loss, speed and the rest", "value", "c5"),
]


def label(model: str) -> str:
    """Return a model's name for readers."""
    return _MODELS.get(model, model)


@dataclass(frozen=True)
class Row:
    """One metric: its label and, for every model, (value, interval) as they are printed."""

    label: str
    cells: list[tuple[str, str]]


def rows(evaluation: object) -> tuple[list[str], list[Row]]:
    """Return the models' labels and the table's rows, from the contents of eval.json.

    Raises InputError for contents that are cut short or of another shape.
    """
    models = evaluation.get("models") if isinstance(evaluation, dict) else None
    if not isinstance(models, dict) or not models:
        raise InputError("eval.json has no models, so it is cut short; evaluate again.")
    for model, metrics in models.items():
        for name, entry in metrics.items() if isinstance(metrics, dict) else [("metrics", None)]:
            if not _is_entry(entry):
                raise InputError(
                    f"eval.json: models.{model}.{name} is not "
                    '{"value": number, "ci95": [low, high]}; evaluate again.'
                )
    names = {name for metrics in models.values() for name in metrics}
    labels = [label(model) for model in models]
    table = []
    for name in sorted(names, key=_position):
        metric, better = _METRICS.get(_family(name), (name, ""))
        if _family(name).endswith("/"):
            metric = f"{metric} {name.removeprefix(_family(name))}"
        cells = [_cell(metrics.get(name)) for metrics in models.values()]
        table.append(Row(f"{metric} {better}".strip(), cells))
    return labels, table


def print_table(evaluation: dict) -> None:
    """Print the result table to the terminal: metrics as rows, models as columns."""
    models, table = rows(evaluation)
    printed = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=_LEGEND, caption_justify="left")
    printed.add_column("", no_wrap=True)
    for model in models:
        printed.add_column(rich.text.Text(model), justify="right")
    for row in table:  # Text: a [ in a reward's name is not markup
        printed.add_row(*map(rich.text.Text, _texts(row)))
    rich.console.Console().print(printed)


def markdown_table(evaluation: dict) -> str:
    """Return the result table in Markdown, for docs/reports/results.md and model cards."""
    models, table = rows(evaluation)
    lines = [["", *models], ["---", *("---:" for _ in models)]]
    lines += [_texts(row) for row in table]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


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
        "Samples during training": _training_samples(workdir / "samples"),
        "Configuration": _configuration(workdir / "config.json"),
        "Versions and hardware": _versions(),
    }
    title = html.escape(f"R0: {workdir.resolve().name}")
    body = "".join(
        f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections.items()
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_CSS}</style></head>
<body><main><h1>{title}</h1><p class="soft">Written {datetime.now():%Y-%m-%d %H:%M}</p>
{body}</main></body></html>
"""
    write_bytes(workdir / "report.html", page.encode("utf-8"))
    return workdir / "report.html"


def read_evaluation(path: Path) -> Json:
    """Read an eval.json; raise InputError if it is broken."""
    check_regular(path)
    try:
        evaluation = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); evaluate again.") from None
    if not isinstance(evaluation, dict):
        raise InputError(f"{path} is not a JSON object; evaluate again.")
    return evaluation


def _result(path: Path) -> str:
    if not path.exists():
        return _missing("eval.json", "the evaluation at the end of a run")
    evaluation = read_evaluation(path)
    models, table = rows(evaluation)
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
    return f"""<p class="soft">The same prompts and noise for every model. {_LEGEND}</p>
<div class="wide"><table class="result"><thead><tr><th></th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>{_differences(evaluation)}{_facts(facts)}"""


def _differences(evaluation: dict) -> str:
    """Return a table of each model less the first one, or nothing where none was measured."""
    found = evaluation.get("differences")
    if not isinstance(found, dict) or not found:
        return ""
    first = label(next(iter(evaluation["models"])))
    models, table = rows({"models": found})
    head = "".join(f"<th>{html.escape(model)}</th>" for model in models)
    body = "".join(
        f"<tr><th>{html.escape(row.label)}</th>"
        + "".join(
            f"<td>{html.escape(value)} <small>{html.escape(interval)}</small></td>"
            for value, interval in row.cells
        )
        + "</tr>"
        for row in table
    )
    return f"""<p class="soft">Differences to {html.escape(first)}, prompt by prompt.</p>
<div class="wide"><table class="result"><thead><tr><th></th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>"""


def _curves(path: Path, config_path: Path) -> str:
    if not path.is_file():
        return _missing("metrics.jsonl", "training")
    series, unreadable = curves.read(path)
    config = _fields(config_path)
    best, bounds = _best_step(series, config.get("best_metric")), _bounds(config.get("veto"))
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
        parts.append(_note(f"Lines of metrics.jsonl that could not be read: {unreadable}."))
    for prefix, heading, label, colour in _CURVES:
        names = sorted(name for name in series if name.startswith(prefix))
        panels = "".join(
            _panel(name, series.pop(name), label, best, bounds.get(name, ())) for name in names
        )
        if not panels and prefix:
            panels = _note(f"metrics.jsonl has no {prefix}… values.")
        if panels:
            parts.append(f'<h3>{heading}</h3><div class="panels {colour}">{panels}</div>')
    return "".join(parts)


def _best_step(series: dict[str, dict[int, float]], metric: object) -> int | None:
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
    note = _note(f"{bad} of {len(values)} values are not finite.") if bad else ""
    chart = curves.draw(values, label, best, bounds) if bad < len(values) else ""
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{chart}{note}</figure>"


def _fields(path: Path) -> Json:
    """Return a config.json, {} where there is none that can be read: its own section says so."""
    try:
        return read_json(path)
    except (OSError, InputError):
        return {}


def _side_by_side(folder: Path) -> str:
    if not (folder / "prompts.jsonl").exists():
        return _missing("samples/eval/prompts.jsonl", "the evaluation at the end of a run")
    try:
        check_regular(folder / "prompts.jsonl")
        lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
        records = [loads(line) for line in lines if line.strip()]
        pairs = [(record["prompt"], record["files"].items()) for record in records]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return _note(f"samples/eval/prompts.jsonl could not be read ({error}).")
    figures = ""
    for prompt, files in pairs[:_PROMPTS_SHOWN]:
        cells = "".join(
            f"<div>{_image(folder / str(file), 256)}"
            f"<small>{html.escape(label(model))}</small></div>"
            for model, file in files
        )
        caption = f"<figcaption>{html.escape(str(prompt))}</figcaption>"
        figures += f'<figure>{caption}<div class="row">{cells}</div></figure>'
    shown = min(len(pairs), _PROMPTS_SHOWN)
    return f"""<p class="soft">The first {shown} of the {len(pairs)} prompts whose images were kept.
On each prompt every model started from the same noise.</p><div class="pairs">{figures}</div>"""


def _training_samples(folder: Path) -> str:
    found = {path: re.fullmatch(r"step_(\d+)", path.stem) for path in folder.glob("step_*.png")}
    steps = {int(match[1]): path for path, match in found.items() if match}
    if not steps:
        return _missing("samples/step_*.png", "the evaluations during training")
    order = sorted(steps)
    last, count = len(order) - 1, min(len(order), _GRIDS_SHOWN)
    chosen = {order[round(i * last / max(count - 1, 1))] for i in range(count)}
    figures = "".join(
        f"<figure><figcaption>step {step}</figcaption>{_image(steps[step], 640)}</figure>"
        for step in sorted(chosen)
    )
    return f"""<p class="soft">The same prompts and noise every time; {len(chosen)} of {len(order)}
grids.</p><div class="grids">{figures}</div>"""


def _configuration(path: Path) -> str:
    if not path.exists():
        return _missing("config.json", "the start of a run")
    try:
        check_regular(path)
        config = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return _note(f"config.json could not be read ({error}).")
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<details><summary>The resolved configuration</summary><pre>{text}</pre></details>"


def _versions() -> str:
    facts = {"python": platform.python_version()}
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        facts[package] = importlib.metadata.version(package)
    kinds = [device.device_kind for device in jax.devices()]
    facts["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    facts["host"] = f"{platform.platform()}, {os.cpu_count()} CPU cores"
    return '<p class="soft">Of the process that wrote this page.</p>' + _facts(facts)


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or "value" not in entry:
        return False
    interval = entry.get("ci95")
    if interval is None:
        interval = [None, None]
    numbers = [entry["value"], *interval] if isinstance(interval, list) else []
    # A whole number of JSON may be larger than any float.
    return len(numbers) == 3 and all(
        n is None or isinstance(n, float) or (isinstance(n, int) and abs(n) < 1e300)
        for n in numbers
    )


def _family(name: str) -> str:
    return next((m for m in _METRICS if m.endswith("/") and name.startswith(m)), name)


def _position(name: str) -> tuple[int, str]:
    order = list(_METRICS)
    return order.index(_family(name)) if _family(name) in order else len(order), name


def _cell(entry: dict | None) -> tuple[str, str]:
    """Return (value, interval): ± the farther end of the 95 % interval, to two digits."""
    if entry is None:
        return "–", ""
    value, (low, high) = entry["value"], entry.get("ci95") or (None, None)
    if value is None or not math.isfinite(value):
        return "not finite", ""
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    if not known or high <= low:
        return f"{value:.4g}", ""
    farther = max(high - value, value - low)  # the interval holds all of it
    digits = min(6, max(0, 1 - math.floor(math.log10(farther))))
    return f"{value:.{digits}f}", f"± {farther:.{digits}f}"


def _texts(row: Row) -> list[str]:
    return [row.label, *(" ".join(cell).strip() for cell in row.cells)]


def _image(path: Path, side: int) -> str:
    """Return an <img> that carries its data, with at most `side` pixels a side."""
    try:
        image = Image.fromarray(to_uint8(load_png(path)))
    except InputError:
        return _note(f"{path.name} is missing or unreadable")
    buffer = io.BytesIO()
    if max(image.size) <= 128:
        image.save(buffer, "PNG", optimize=True)
    else:  # as PNG, photographs and grids would take tens of megabytes
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=85)
    kind = "png" if buffer.getvalue().startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(path.name)}" src="data:image/{kind};base64,{data}">'


def _facts(facts: dict) -> str:
    pairs = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(_brief(value))}</dd>"
        for name, value in facts.items()
    )
    return f"<dl>{pairs}</dl>" if facts else ""


def _brief(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _missing(file: str, writer: str) -> str:
    return _note(f"There is no {file} in this folder; it is written by {writer}.")


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


_CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4;
  --tint: #eef5fb; --c1: #0072b2; --c2: #c45500; --c3: #9a3f78; --c4: #007a5a; --c5: #59636e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa4ae;
  --rule: #333a41; --tint: #1b2733; --c1: #56b4e9; --c2: #f0a030; --c3: #d98fbd; --c4: #3ecfa0;
  --c5: #9aa4ae; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font-family: system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 42rem; }
.soft, small { color: var(--soft); }
small { font-size: .8rem; }
.note { color: var(--soft); font-size: .85rem; border-left: 3px solid var(--c2);
  padding-left: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
tbody th { text-align: left; font-weight: 400; }
td { white-space: nowrap; }
.ours { background: var(--tint); font-weight: 600; }
.ours small { font-weight: 400; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.panels figcaption { font-weight: 600; }
.c1 { --line: var(--c1); } .c2 { --line: var(--c2); } .c3 { --line: var(--c3); }
.c4 { --line: var(--c4); } .c5 { --line: var(--c5); }
svg { display: block; width: 100%; height: auto; font-family: inherit; overflow: visible; }
img { display: block; width: 100%; height: auto; border-radius: 3px; }
.pairs { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
.pairs figure { display: flex; flex-direction: column; justify-content: space-between; gap: .3rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .4rem; }
.row img { image-rendering: pixelated; }
.grids { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { th, td { padding: .35rem .4rem; font-size: .85rem; }
  td small { display: block; } }
"""
