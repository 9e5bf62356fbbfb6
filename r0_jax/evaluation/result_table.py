"""The result table of an eval.json: in the terminal, in Markdown, or as rows."""

import math
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.console
import rich.table
import rich.text

from r0_jax.errors import InputError
from r0_jax.files import Json, check_regular, loads

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
    "frechet_clip_floor": ("Frechet distance of CLIP features of two parts", ""),
    "frechet_dinov2": ("Frechet distance of DINOv2 features", "↓"),
    "frechet_dinov2_floor": ("Frechet distance of DINOv2 features of two parts", ""),
    "fid_clean": ("FID, clean resize", "↓"),
    "fid_clean_floor": ("FID of two parts, clean resize", ""),
    "fid_legacy": ("FID, legacy resize", "↓"),
    "fid_legacy_floor": ("FID of two parts, legacy resize", ""),
    "diversity": ("diversity", "↑"),
    "reward/": ("reward:", "↑"),
    "hpsv2/": ("HPSv2 benchmark:", "↑"),
    "sign/": ("sign of hacking:", ""),
    "network_calls": ("network calls", "↓"),
    "seconds_per_image": ("seconds per image", "↓"),
}
LEGEND = "±: farther end of the 95 % interval. ↑: larger is better, ↓: smaller."


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
    for name in sorted(names, key=position):
        cells = [_cell(metrics.get(name)) for metrics in models.values()]
        table.append(Row(row_label(name), cells))
    return labels, table


def row_label(name: str) -> str:
    """Return a metric's name for readers, with an arrow where one way is better."""
    metric, better = _METRICS.get(_family(name), (name, ""))
    if _family(name).endswith("/"):
        metric = f"{metric} {name.removeprefix(_family(name))}"
    return f"{metric} {better}".strip()


def print_table(evaluation: dict) -> None:
    """Print the result table to the terminal: metrics as rows, models as columns."""
    models, table = rows(evaluation)
    printed = rich.table.Table(box=rich.box.SIMPLE_HEAD, caption=LEGEND, caption_justify="left")
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


def position(name: str) -> tuple[int, str]:
    """Return the key by which the rows of metrics are sorted."""
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
