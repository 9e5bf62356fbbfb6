"""The result table in its three forms, and the page from whole, partial and broken runs."""

import base64
import html
import io
import json
import math
import re

import numpy as np
import pytest
from pages import Page, evaluation, write_run
from PIL import Image

from r0_jax.errors import InputError
from r0_jax.evaluation import images, report, result_table


def test_rows_are_ordered_labelled_and_rounded_by_their_interval():
    models, table = result_table.rows(evaluation())
    assert models == ["base, 25 steps, guided", "R0, 4 steps"]
    assert [(row.label, row.cells) for row in table] == [
        # ± is the farther end: 0.99 - 0.971, not 0.996 - 0.99.
        ("judge accuracy ↑", [("0.990", "± 0.019"), ("0.900", "± 0.019")]),
        ("Frechet distance ↓", [("–", ""), ("not finite", "")]),
        ("diversity ↑", [("–", ""), ("0.5", "")]),
        ("reward: <b>[red]|x ↑", [("0.250", "± 0.012"), ("–", "")]),
        ("network calls ↓", [("50", ""), ("4", "")]),
        ("seconds per image ↓", [("0.800", "± 0.010"), ("–", "")]),
        ("unheard_of", [("–", ""), ("12.0", "± 3.0")]),
    ]


def test_terminal_table_shows_every_cell_and_takes_no_markup(capsys):
    result_table.print_table(evaluation())
    printed = capsys.readouterr().out
    for text in ("R0, 4 steps", "0.990 ± 0.019", "reward: <b>[red]|x ↑", "12.0 ± 3.0", "not fin"):
        assert text in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_markdown_table_is_a_pipe_table():
    lines = result_table.markdown_table(evaluation()).splitlines()
    assert lines[0] == "|  | base, 25 steps, guided | R0, 4 steps |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[2] == "| judge accuracy ↑ | 0.990 ± 0.019 | 0.900 ± 0.019 |"
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        {"models": {}},
        {"models": {"r0_4": None}},
        {"models": {"r0_4": {"diversity": 0.5}}},
        {"models": {"r0_4": {"diversity": {"ci95": [0, 1]}}}},
        {"models": {"r0_4": {"diversity": {"value": "0.5", "ci95": [0, 1]}}}},
        {"models": {"r0_4": {"diversity": {"value": 0.5, "ci95": [0]}}}},
        {"models": {"r0_4": {"diversity": {"value": 0.5, "ci95": 0.1}}}},
        {"models": {"r0_4": {"diversity": {"value": 10**400, "ci95": [0, 1]}}}},
    ],
)
def test_broken_evaluation_is_one_line(broken, tmp_path):
    with pytest.raises(InputError, match=r"^eval\.json[^\n]*evaluate again\.$"):
        result_table.rows(broken)
    (tmp_path / "eval.json").write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(InputError):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_half_an_eval_json_or_no_workdir_is_an_input_error(tmp_path):
    whole = json.dumps(evaluation()).encode()
    for data in (b"", whole[:100], b"\xff\xfe\x00", b"[" * 100_000, b"1" * 5000):
        (tmp_path / "eval.json").write_bytes(data)
        with pytest.raises(InputError, match=r"eval\.json is not readable JSON"):
            report.write_report(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        report.write_report(tmp_path / "absent")


def test_report_of_a_whole_run(tmp_path):
    write_run(tmp_path)
    path = report.write_report(str(tmp_path))
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)

    assert "base, 25 steps, guided" in page.text and "± 0.019" in page.text
    assert "reward: <b>[red]|x" in page.text and "<b>" not in text
    assert "reward/hps" in page.text and "heldout/clip" in page.text
    assert "3 of 3 values are not finite." in page.text
    assert "metrics.jsonl has no norm/x0/… values." in page.text
    assert "<script>0</script> 红" in page.text and "<script" not in text
    assert "<script>11</script>" in page.text and "<script>12</script>" not in page.text
    assert "base_25" not in page.text and "0.png is missing or unreadable" in page.text
    assert "<i>红</i>" in page.text and "<i>" not in text
    assert re.search(r"devices\s*\d+ x ", page.text) and "jax" in page.text
    steps = re.findall(r"step (\d+)<", text)
    assert len(steps) == 6 and steps[0] == "0" and steps[-1] == "100"
    assert text.count("<svg") == 2

    # Self-contained: every source is inside, and small.
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 12 + 6 and all(source.startswith("data:image/") for source in sources)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text) and "@import" not in text
    sizes = [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))).size for s in sources]
    assert sizes[0] == (64, 64) and max(sizes[-1]) == 640
    assert len(text) < 500_000


def test_strips_show_a_prompt_step_by_step(tmp_path):
    """Of images that are not square, with prompts that are escaped; the grids follow."""
    write_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eval": {"grid": 6}}))
    prompts = [f"<i>prompt</i> {i} 红" for i in range(9)]
    (tmp_path / "eval_prompts.json").write_text(json.dumps(prompts))
    for path in (tmp_path / "samples").glob("step_*.png"):
        path.unlink()
    for step in (0, 25, 50):
        drawn = np.stack([np.full((6, 10, 3), 10 * i + step, np.uint8) for i in range(6)])
        images.save_png(tmp_path / f"samples/step_{step:06d}.png", images.grid(drawn, 4))
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    strips = text[text.index('class="strips"') : text.index('class="grids"')]
    assert [html.unescape(x) for x in re.findall("<figcaption>(.*?)<", strips)] == prompts[:4]
    found = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall('base64,([^"]+)"', strips)
    ]
    assert all(image.shape == (6, 10, 3) for image in found)
    assert [int(image.max()) for image in found] == [
        10 * i + step for i in range(4) for step in (0, 25, 50)
    ]
    (tmp_path / "eval_prompts.json").write_text("no JSON")
    assert 'class="grids"' in report.write_report(tmp_path).read_text(encoding="utf-8")


def test_the_best_checkpoint_and_the_bounds_of_the_veto_are_drawn(tmp_path):
    config = {"steps": 9, "best_metric": "heldout/clip", "veto": {}}
    config["veto"] = {"contrast": [0.5, 2], "vetoed": [0, 10**400], "dark": 3}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = [
        {"step": step, "heldout/clip": clip, "hacking/contrast": 1.0, "hacking/vetoed": vetoed}
        for step, (clip, vetoed) in enumerate([(0.1, 0), (0.3, 0), (0.9, 1), (math.nan, 0)])
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    whole = report.write_report(tmp_path).read_text(encoding="utf-8")
    shown = Page(whole).text
    assert "Step 3 of 9." in shown and "bounds of config.veto" in shown
    assert "The best checkpoint is that of step 1, by\nheldout/clip" in shown
    charts = {re.match(r"[^<]*", x)[0]: x for x in whole.split("<figcaption>")[1:]}
    broken_lines = {name: chart.count("stroke-dasharray") for name, chart in charts.items()}
    assert broken_lines == {"heldout/clip": 1, "hacking/contrast": 1 + 2, "hacking/vetoed": 1 + 1}
    for broken in ("{", "[]", '{"veto": 3, "best_metric": null}'):
        (tmp_path / "config.json").write_text(broken, encoding="utf-8")
        assert "best checkpoint" not in report.write_report(tmp_path).read_text(encoding="utf-8")


def test_report_of_an_empty_folder_says_what_is_missing(tmp_path):
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    for name in (
        "eval.json",
        "metrics.jsonl",
        "samples/eval/prompts.jsonl",
        "samples/step_*.png",
        "config.json",
    ):
        assert f"There is no {name} in this folder" in page.text


def test_damaged_side_files_are_named_and_do_not_stop_the_report(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "samples" / "step_000000.png").write_bytes(b"no image")
    for line in ("{", "[]", "[" * 100_000, '{"prompt": "x"}', '{"prompt": "x", "files": 3}'):
        (tmp_path / "samples" / "eval" / "prompts.jsonl").write_text(line, encoding="utf-8")
        page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
        assert "prompts.jsonl could not be read" in page.text
    assert "config.json could not be read" in page.text
    assert "step_000000.png is missing or unreadable" in page.text
    assert "0.990" in page.text
