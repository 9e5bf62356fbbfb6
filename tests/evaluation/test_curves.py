"""Reading what a run logged, killed and resumed runs included, and drawing it as page-ready SVG."""

import json
import math
import re
import xml.etree.ElementTree

import matplotlib
import pytest

from r0_jax.evaluation import curves


def texts(svg):
    """What a reader sees, in order."""
    nodes = xml.etree.ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(node.itertext()).strip() for node in nodes]


def path_lengths(svg):
    """Points of every path drawn."""
    return [len(re.findall(r"[ML] ", path)) for path in re.findall(r' d="([^"]*)"', svg)]


def test_read_keeps_the_last_of_a_step_and_counts_what_it_cannot_read(tmp_path):
    lines = [
        json.dumps({"step": 1, "train/loss": 3.0, "reward/a": 0.5}),
        json.dumps({"step": 2, "train/loss": None, "note": "text is no metric"}),
        json.dumps({"step": 3, "train/loss": 9.0}),
        json.dumps({"step": 3, "train/loss": math.nan}),  # step 3 again, after a resume
        json.dumps({"train/loss": 4.0}),  # no step
        "[1, 2]",
        "[" * 100_000,
        '{"step": ' + "9" * 400 + "}",
        '{"step": 5, "train/loss": ' + "9" * 400 + "}",
        json.dumps({"step": 6, "train/loss": -1.7e308}),
        '{"step": 4, "train/lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    series, unreadable = curves.read(tmp_path / "metrics.jsonl")
    assert unreadable == 5
    assert sorted(series) == ["reward/a", "train/loss"]
    assert series["reward/a"] == {1: 0.5}
    assert series["train/loss"][1] == 3.0
    assert all(math.isnan(series["train/loss"][step]) for step in (2, 3, 5, 6))


def test_a_short_run_is_drawn_point_by_point_with_labelled_axes_and_last_value():
    svg = curves.draw({1: 0.25, 5: 0.5, 9: math.nan, 12: 0.75}, "held-out reward")
    shown = texts(svg)
    assert {"step", "held-out reward", "0.75"} <= set(shown)
    assert 3 in path_lengths(svg)  # the line; the value that is not finite has no point
    assert "fill-opacity" not in svg  # no band


def test_a_long_run_is_binned_and_its_spike_stays_in_the_band():
    values = dict.fromkeys(range(5000), 1.0)
    flat = curves.draw(values, "loss")
    spiked = curves.draw(values | {2500: 11.0}, "loss")
    assert len(spiked) < 20_000 and max(path_lengths(spiked)) <= 2 * 100 + 3
    assert "fill-opacity" in spiked
    ticks = [float(text) for text in texts(spiked) if re.fullmatch(r"\d+(\.\d+)?", text)]
    assert any(5 < tick < 20 for tick in ticks)  # the axis reaches the spike
    assert flat != spiked
    holed = curves.draw(values | {2500: math.nan}, "loss")
    assert path_lengths(holed) == path_lengths(flat)  # its bin keeps its other values


def test_only_positive_values_over_decades_get_a_logarithmic_axis():
    decades = {"10", "100"}
    assert decades <= set(texts(curves.draw({1: 3.0, 2: 120.0}, "norm")))
    assert not decades <= set(texts(curves.draw({1: 90.0, 2: 120.0}, "norm")))
    assert not decades <= set(texts(curves.draw({1: 0.0, 2: 120.0}, "norm")))


def test_rounding_coordinates_spares_the_numbers_one_reads():
    shown = texts(curves.draw({1: 0.0012345, 2: 0.0012365}, "norm"))
    assert "0.001236" in shown or "0.001237" in shown
    assert "1.2352" in shown  # a tick, in units of 1e-3


@pytest.mark.parametrize("values", [{7: 0.5}, {1: 0.0, 2: 0.0}, {3: -1e9, 4: 1e9}])
def test_degenerate_series_are_drawn_without_warnings(values):
    assert "step" in texts(curves.draw(values, "value"))


def test_svg_takes_the_pages_colours_and_leaves_the_page_and_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    first, second = (curves.draw({1: 0.1, 2: 0.4}, "reward") for _ in range(2))
    assert dict(matplotlib.rcParams) == before
    assert not re.search(r"#[0-9a-f]{6}", first.replace("url(#", "(")) and "var(--line)" in first
    assert (
        "<style" not in first
        and "font-family" not in first
        and "http:" not in first.replace("http://www.w3.org", "")
    )
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])  # both may stand in one page
    assert re.match(r'<svg [^>]*viewBox="', first) and not re.match(r"<svg [^>]* width=", first)
