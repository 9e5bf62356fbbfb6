"""Intervals as pictures."""

import re

import pytest

from r0_jax.evaluation import interval_plot


def numbers(text):
    """Where the interval begins and ends, and where its dot is."""
    left, right = re.search(r'class="interval" d="M([\d.]+) [\d.]+H([\d.]+)"', text).groups()
    return float(left), float(re.search(r'cx="([\d.]+)"', text)[1]), float(right)


def test_an_interval_is_drawn_around_no_difference():
    sure = interval_plot.draw({"value": 0.5, "ci95": [0.25, 1.0]})
    assert numbers(sure) == (73.5, 87.0, 114.0) and 'class="sure"' in sure
    mirrored = interval_plot.draw({"value": -0.5, "ci95": [-1.0, -0.25]})
    assert numbers(mirrored) == (6.0, 33.0, 46.5) and 'class="sure"' in mirrored
    unsure = interval_plot.draw({"value": 0.5, "ci95": [-0.5, 1.0]})
    assert numbers(unsure)[0] == 33.0 and "sure" not in unsure


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"value": 1.0},
        {"value": 1.0, "ci95": None},
        {"value": 1.0, "ci95": [None, None]},
        {"value": None, "ci95": [0.0, 1.0]},
        {"value": 1.0, "ci95": [1.0, 1.0]},
        {"value": float("nan"), "ci95": [0.0, 1.0]},
    ],
)
def test_nothing_is_drawn_without_an_interval(entry):
    assert interval_plot.draw(entry) == ""
