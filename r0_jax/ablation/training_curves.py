"""Draws what the variants of an ablation logged: a panel a metric, a line a variant."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_ACROSS = 3  # panels a row
_MOST = 12  # panels
# Of many metrics with these prefixes the first ones are shown, in this order.
_SHOWN = ("heldout/", "reward/", "hacking/contrast", "hacking/diversity", "norm/x0/", "cosine/x0/")
# Told apart by people who do not see all colours (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Return a PNG of `curves` as a results file has them; b"" where nothing was logged."""
    from matplotlib.figure import Figure

    names = _names(curves)
    if not names:
        return b""
    down = math.ceil(len(names) / _ACROSS)
    figure = Figure(figsize=(3.4 * _ACROSS, 2.3 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, _ACROSS, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        for number, (variant, seeds) in enumerate(curves.items()):
            found = [np.asarray(seed[name]) for seed in seeds if len(seed.get(name, ()))]
            if not found:
                continue
            # Seeds that stopped early have fewer points.
            length = min(len(points) for points in found)
            steps = found[0][:length, 0]
            values = np.stack([points[:length, 1] for points in found])
            colour = _COLOURS[number % len(_COLOURS)]
            style = "-" if number < len(_COLOURS) else "--"
            panel.plot(steps, values.mean(axis=0), style, color=colour, label=variant)
            panel.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0
            )
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_xlabel("step", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _names(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the metrics that get a panel."""
    logged = sorted({name for seeds in curves.values() for seed in seeds for name in seed})
    # The rewards' pull has norm 1 by definition.
    wanted = [
        name
        for prefix in _SHOWN
        for name in logged
        if name.startswith(prefix) and name != "norm/x0/rewards"
    ]
    return wanted[:_MOST]
