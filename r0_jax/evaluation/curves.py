"""Draws metrics.jsonl as small charts: one SVG a metric, in the colours of the page around it."""

import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MOST = 1e300  # larger values do not fit on an axis
_BINS = 100  # points a chart shows at most
# Each colour stands for one of the page's, so that one SVG fits its light and its dark look.
_COLOURS = {"#000001": "var(--soft)", "#000002": "var(--rule)", "#000003": "var(--line)"}
_TEXT, _RULE, _LINE = _COLOURS
SEVERAL = {f"#00001{i}": f"var(--c{i})" for i in range(1, 9)}  # of lines that share a chart


def read(path: str | os.PathLike) -> tuple[dict[str, dict[int, float]], int]:
    """Return {metric: {step: value}} of a metrics.jsonl, and the number of unreadable lines.

    A step that was written again after a resume replaces the first one. Values that are null, NaN,
    infinite or too large for an axis become NaN. Half a line at the end, which a killed run leaves,
    counts as unreadable.
    """
    series, unreadable = {}, 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            if abs(step) > _MOST:
                raise OverflowError
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            unreadable += 1
            continue
        for name, value in record.items():
            if value is None or isinstance(value, (int, float)):
                finite = value is not None and abs(value) < _MOST
                series.setdefault(name, {})[step] = float(value) if finite else math.nan
    return series, unreadable


def draw(
    values: dict[int, float],
    label: str,
    marked: int | None = None,
    bounds: tuple[float, ...] = (),
) -> str:
    """Return an SVG of one metric over the steps, with its last value at the line's end.

    A dotted line stands at the step `marked`, dashed lines at the values `bounds`.

    A long run falls into at most 100 bins. The line is the mean of each bin. The band around it
    goes from the smallest to the largest value, so that no spike is lost. Positive values that span
    more than a factor of 30 get a logarithmic axis. `label` names the value axis.
    """
    steps, x, low, mean, high = _binned(values)
    figure, axes = _figure()
    if len(x) < len(steps):
        axes.fill_between(x, low, high, color=_LINE, alpha=0.22, linewidth=0)
    axes.plot(x, mean, color=_LINE, linewidth=1.6, marker="o" if len(x) <= 30 else "", markersize=3)
    if marked is not None:
        axes.axvline(marked, color=_TEXT, linewidth=0.9, linestyle=":")
    for bound in bounds:
        axes.axhline(bound, color=_TEXT, linewidth=0.9, linestyle="--")
    axes.annotate(
        f"{mean[-1]:.4g}",
        (x[-1], mean[-1]),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=_LINE,
        fontsize=8,
        fontweight="bold",
        annotation_clip=False,
    )
    _scale(axes, label, low.min(), high.max())
    return _svg(figure)


def draw_several(series: Sequence[dict[int, float]], label: str) -> str:
    """Return an SVG of one metric of several runs, whose colours are those of `SEVERAL` in order.

    Each line is the mean of at most 100 bins. A run without a finite value has no line.
    """
    figure, axes = _figure()
    lows, highs = [], []
    for colour, values in zip(SEVERAL, series, strict=False):
        if not any(math.isfinite(value) for value in values.values()):
            continue
        _, x, _, mean, _ = _binned(values)
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, mean, color=colour, linewidth=1.4, marker=marker, markersize=2.5)
        lows.append(mean.min())
        highs.append(mean.max())
    _scale(axes, label, min(lows), max(highs))
    return _svg(figure)


def _binned(values: dict[int, float]) -> tuple[np.ndarray, ...]:
    """Return the finite steps, and of at most 100 bins the step, and least, mean, most value."""
    steps = np.array(sorted(step for step, value in values.items() if math.isfinite(value)))
    heights = np.array([values[step] for step in steps.tolist()])
    bins = np.array_split(np.arange(len(steps)), min(len(steps), _BINS))
    rows = [(steps[i].mean(), heights[i].min(), heights[i].mean(), heights[i].max()) for i in bins]
    return steps, *np.array(rows).T


def _figure() -> tuple[Any, Any]:
    """Return a matplotlib Figure and its axes; pyplot would change the caller's matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2, 1.9))
    # A layout engine would draw everything twice.
    return figure, figure.add_axes((0.2, 0.24, 0.62, 0.64))


def _scale(axes: Any, label: str, least: float, most: float) -> None:
    """Set the axes' scale for values from `least` to `most`, and their looks."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if least > 0 and most > 30 * least:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    axes.set_xlabel("step", color=_TEXT, fontsize=8)
    axes.set_ylabel(label, color=_TEXT, fontsize=8)
    axes.tick_params(which="both", color=_RULE, labelcolor=_TEXT, labelsize=8)
    axes.yaxis.get_offset_text().set(color=_TEXT, fontsize=8)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _svg(figure: Any) -> str:
    """Return a matplotlib Figure as an SVG in the colours of the page around it."""
    import matplotlib

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text, in the page's font
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern, replacement in (
        (
            r'<g id="[^"]*"',
            "<g",
        ),  # figure_1 stands in every chart, and an id must be unique in a page
        (r"<style.*?</style>", ""),  # it would style the whole page
        (r"font-family: [^;]*; ", ""),
        (r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1"),  # as wide as its place in the page
        (r"(\d\.\d\d)\d+(?=[^<>]*>)", r"\1"),  # coordinates, not text
        (r"\s+", " "),
    ):
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    for stand_in, colour in (_COLOURS | SEVERAL).items():
        svg = svg.replace(stand_in, colour)
    return svg
