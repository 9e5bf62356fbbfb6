"""Draws a difference and its interval as an SVG, on an axis that is scaled to it."""

import math
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 120, 14, 6  # pixels


def draw(entry: dict[str, Any] | None) -> str:
    """Return an <svg> of {"value", "ci95"}: a dot, its interval, and where nothing differs.

    The axis reaches as far to the left of 0 as to the right. Whether the interval holds 0 is what
    can be read; sizes of two plots cannot be compared. "" where there is no finite interval.
    """
    low, high = (entry or {}).get("ci95") or (None, None)
    numbers = [low, (entry or {}).get("value"), high]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or low >= high:
        return ""
    reach = max(abs(low), abs(high))
    middle, half = _WIDTH / 2, _WIDTH / 2 - _MARGIN
    left, at, right = (middle + half * x / reach for x in numbers)
    y, sure = _HEIGHT / 2, "" if low <= 0 <= high else ' class="sure"'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="interval"{sure}>'
        f'<path class="zero" d="M{middle} 0V{_HEIGHT}"/>'
        f'<path class="interval" d="M{left:.1f} {y}H{right:.1f}"/>'
        f'<circle cx="{at:.1f}" cy="{y}" r="3"/></svg>'
    )
