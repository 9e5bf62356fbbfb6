"""Models compared by image files, with rewards of a line each."""

import json

import numpy as np
import pytest

from r0_jax.errors import InputError
from r0_jax.evaluation import comparison, contenders, hpsv2, images, report, statistics
from r0_jax.evaluation.comparison import Contender, Judges, arrange
from r0_jax.evaluation.pairing import Item
from r0_jax.prompts.records import FILE, Prompt
from r0_jax.rewards.reward import Reward

PROMPTS = [
    Prompt(f"{style} {i}", None, {FILE: style}) for style in ("anime", "photo") for i in "ab"
]
TEXTS = [prompt.text for prompt in PROMPTS]


def folder(path, shades, each):
    """Images of one shade each, listed as `sample` lists them."""
    lines = []
    for i, shade in enumerate(shades):
        images.save_png(path / f"{i}.png", np.full((16, 16, 3), shade / 255, np.float32))
        row = {"id": str(i), "prompt": TEXTS[i // each], "image_path": f"{i}.png"}
        lines.append(json.dumps(row))
    (path / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    return contenders.of_folder(path.name, path, TEXTS, len(TEXTS))


def brightness(calls=None):
    def score(params, drawn, features):
        if calls is not None:
            calls.append(len(drawn))
        return drawn.mean(axis=(1, 2, 3))

    return Reward("hps", {}, score, None, grid=4)


def test_values_are_means_over_samples_and_differences_are_paired(tmp_path):
    ours = folder(tmp_path / "ours", [10, 30, 40, 60, 70, 90, 100, 120], each=2)
    base = folder(tmp_path / "base", [10, 40, 60, 90], each=1)
    ours = ours._replace(calls=4, seconds=[0.5, 0.7])
    judges = Judges([brightness()], {"hps": "hps_v2_1"}, [], "job")
    out = tmp_path / "out"
    table = comparison.compare([base, ours], PROMPTS, judges, out, {"seed": 3}, batch_size=3)
    expected = np.asarray([20, 50, 80, 110]) / 255
    with np.load(out / "eval_values.npz") as arrays:
        np.testing.assert_allclose(arrays["ours/reward/hps"], expected, atol=1e-5)
    theirs = np.asarray([10, 40, 60, 90]) / 255
    found = table["differences"]["ours"]["reward/hps"]
    pairs = statistics.paired_ci(expected, theirs)
    assert found["value"] == pytest.approx(pairs["value"], abs=1e-5)
    assert found["ci95"] == pytest.approx(pairs["ci95"], abs=1e-4)
    entries = table["models"]["ours"]
    assert entries["network_calls"]["value"] == 4 and "network_calls" not in table["models"]["base"]
    assert entries["seconds_per_image"]["value"] == pytest.approx(0.6)
    assert entries["sign/contrast"]["value"] == pytest.approx(0, abs=1e-6)
    assert "sign/grid_energy_4" in entries and "sign/diversity" in entries
    assert table["hpsv2"]["base"]["hps"]["photo"]["mean"] == pytest.approx(100 * 75 / 255, abs=1e-3)
    assert entries["hpsv2/hps, anime"]["value"] == pytest.approx(100 * 35 / 255, abs=1e-3)
    assert json.loads((out / "eval.json").read_text("utf-8"))["seed"] == 3
    # The report shows both models' images of the first prompt.
    page = report.write_report(out).read_text("utf-8")
    assert page.count("data:image/") == 2 * len(PROMPTS) and "Differences to base" in page


def test_a_killed_comparison_keeps_scores(tmp_path):
    base = folder(tmp_path / "base", [10, 40, 60, 90], each=1)
    ours = folder(tmp_path / "ours", [11, 41, 61, 91], each=1)
    (tmp_path / "ours" / "3.png").write_bytes(b"broken")
    calls = []
    judges = Judges([brightness(calls)], {"hps": "clip_score"}, [], "job")
    with pytest.raises(InputError, match=r"ours: .*3\.png is not an image"):
        comparison.compare([base, ours], PROMPTS, judges, tmp_path / "out", {})
    assert not (tmp_path / "out" / "eval.json").exists()
    assert list((tmp_path / "out").glob(".ours.scores.unfinished"))
    images.save_png(tmp_path / "ours" / "3.png", np.full((16, 16, 3), 91 / 255))
    table = comparison.compare([base, ours], PROMPTS, judges, tmp_path / "out", {})
    assert table["differences"]["ours"]["reward/hps"]["value"] == pytest.approx(1 / 255, abs=1e-5)
    assert "hpsv2/hps, anime" not in table["models"]["ours"]  # it is no HPS
    assert not list((tmp_path / "out").glob(".*unfinished"))


def test_images_are_put_in_the_order_of_prompts(tmp_path):
    items = [Item(tmp_path / f"{i}.png", text) for i, text in enumerate(["b", "a", "b", "a", "c"])]
    found = arrange(items, ["a", "b"], "peer")
    assert [item.path.stem for item in found] == ["1", "3", "0", "2"]
    again = arrange(items, ["a", "b", "a", "b"], "peer")  # a prompt that is there twice
    assert [item.path.stem for item in again] == ["1", "0", "3", "2"]
    with pytest.raises(InputError, match="peer has 1 images of 'c', but should have as many"):
        arrange(items, ["a", "c"], "peer")
    with pytest.raises(InputError, match="peer has 0 images of 'd'"):
        arrange(items, ["d"], "peer")


def test_folders_without_a_list_are_paired_by_number(tmp_path):
    for i in range(3):
        images.save_png(tmp_path / f"{i:05d}.png", np.zeros((4, 4, 3)))
    found = contenders.of_folder("peer", tmp_path, ["a", "b", "c"], 2)
    assert isinstance(found, Contender) and [item.prompt for item in found.items] == ["a", "b"]
    with pytest.raises(InputError, match="image 00003 is missing"):
        contenders.of_folder("peer", tmp_path, ["a", "b", "c", "d"], 4)


def test_hpsv2_is_as_its_tool_prints_it():
    scores = np.random.default_rng(0).normal(0.28, 0.02, 1600)
    styles = ["photo", "anime"] * 800
    found = hpsv2.by_style(scores, styles)
    assert list(found) == ["anime", "photo"]
    for style, rows in (("photo", scores[::2]), ("anime", scores[1::2])):
        blocks = [np.mean(rows[i : i + 80]) * 100 for i in range(0, 800, 80)]
        assert found[style].mean == pytest.approx(np.mean(blocks))
        assert found[style].std == pytest.approx(np.std(blocks))
        assert found[style].entry["value"] == pytest.approx(100 * rows.mean())
    assert hpsv2.styles_of(PROMPTS) == ["anime", "anime", "photo", "photo"]
    assert hpsv2.styles_of([*PROMPTS, Prompt("x", None, {})]) is None
