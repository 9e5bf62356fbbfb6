"""The page that compares several runs, from whole, young and broken ones."""

import json

import numpy as np
import pytest
from pages import Page, entry, write_run

from r0_jax.errors import InputError
from r0_jax.evaluation import run_comparison
from r0_jax.evaluation.results import VALUES


@pytest.fixture
def runs(tmp_path):
    """Two whole runs of one measurement, and one that has just begun."""
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "<young>"]
    for number, folder in enumerate(folders[:2]):
        write_run(folder)
        right = np.array([1, 1, number, 0.0])
        models = ("r0_4", "base_4")
        values = {f"{model}/judge_accuracy": right for model in models}
        np.savez(folder / VALUES, **values, **{"r0_4/features": right})
        evaluation = {
            "models": {model: {"judge_accuracy": entry(0.5, 0.1)} for model in models},
            "prompts": 4,
            "seed": 0,
            "test": {"prompts": "test.txt"},
        }
        (folder / "eval.json").write_text(json.dumps(evaluation), "utf-8")
        config = {"steps": 100, "lora": {"rank": 4 * number}, "best_metric": "heldout/clip"}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    folders[2].mkdir()
    (folders[2] / "config.json").write_text(json.dumps({"steps": 5}), "utf-8")
    return folders


def test_a_page_of_three_runs(runs):
    page = Page(run_comparison.write(runs).decode())
    text = page.text
    assert "a/run" in text and "b/run" in text and "<young>" in text
    assert "No eval.json yet:" in text
    assert "lora.rank" in text and "best_metric" in text
    # (0, 0, 1, 0): a mean of 0.25 with a t interval of half a width of 0.796
    assert "+0.25 (-0.5456 to +1.046)" in text
    assert text.count("judge accuracy") == 2
    assert "heldout/clip" in text and "<script>0</script>" in text


def test_runs_that_were_measured_differently(runs):
    path = runs[1] / "eval.json"
    path.write_text(path.read_text("utf-8").replace('"seed": 0', '"seed": 1'), "utf-8")
    text = Page(run_comparison.write(runs[:2]).decode()).text
    assert "The runs were measured differently" in text
    assert "No other run was measured on the prompts and noise" in text


def test_the_same_run_twice_or_none(runs, tmp_path):
    with pytest.raises(InputError, match="twice with one folder"):
        run_comparison.write([runs[0], runs[0]])
    with pytest.raises(InputError, match="not the workdir of a run"):
        run_comparison.write([runs[0], tmp_path])


@pytest.mark.parametrize("name", ["config.json", "eval.json", VALUES, "samples/eval/prompts.jsonl"])
def test_a_broken_file_is_one_line(runs, name):
    (runs[1] / name).write_bytes(b"\x00{")
    with pytest.raises(InputError, match=name.rsplit("/", 1)[-1]):
        run_comparison.write(runs[:2])


@pytest.mark.parametrize("models", [[1], {"r0_4": 3}, {"r0_4": {"judge_accuracy": "high"}}])
def test_a_table_of_another_shape_is_one_line(runs, models):
    (runs[1] / "eval.json").write_text(json.dumps({"models": models}), "utf-8")
    with pytest.raises(InputError, match=r"eval\.json"):
        run_comparison.write(runs[:2])


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"]
    assert run_comparison._names(paths) == ["x/run", "y/run", "y/other"]
    assert run_comparison._names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
