"""The command that trains the runs of an ablation and writes its page."""

import json
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from r0_jax import ablate
from r0_jax.ablation import results, training_curves, workers
from r0_jax.ablation.grid import Cell
from r0_jax.errors import STOPPED, InputError
from r0_jax.evaluation import images
from r0_jax.evaluation.results import VALUES

GUIDED, SEEDS, VARIANTS = "base_25_guided", (0, 1), ("R0", "rewards alone")


def cells():
    fields = {"steps": 4, "early_stop": 0, "compilation_cache": ""}
    return [
        Cell(name, seed, ConfigDict(fields | {"seed": seed, "test": {"base": name == "R0"}}))
        for seed in SEEDS
        for name in VARIANTS
    ]


def trained(config, workdir, stop):
    """Leave in a workdir what a run leaves there: R0 is right twice, the other variant once."""
    folder, ours = workdir.path, config.test.base
    models = [GUIDED, "r0_4"] if ours else ["r0_4"]
    (folder / "samples" / "eval").mkdir(parents=True)
    entry = {"value": 0.5, "ci95": [0.4, 0.6]}
    found = {"models": {name: {"judge_accuracy": entry} for name in models}, "prompts": 4}
    (folder / "eval.json").write_text(json.dumps(found | {"seed": config.seed}), encoding="utf-8")
    right = np.array([1, 1, 0, 1.0]) if ours else np.array([1, 0, 0, 0.0])
    np.savez(folder / VALUES, **{f"{name}/judge_accuracy": right for name in models})
    images.save_png(folder / "samples" / "eval" / "0.png", np.zeros((8, 8, 3)))
    record = {"prompt": "红色的圆", "files": dict.fromkeys(models, "0.png")}
    (folder / "samples" / "eval" / "prompts.jsonl").write_text(json.dumps(record), "utf-8")
    logged = [{"step": i, "reward/clip": 0.1 * i, "train/loss": 1.0} for i in range(1, 41)]
    logged[3]["reward/clip"] = float("nan")
    logged[-1]["heldout/clip"] = 0.25 + config.seed
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)), "utf-8")
    return True


@pytest.fixture
def train(monkeypatch):
    train = mock.create_autospec(ablate.train.train_and_evaluate, side_effect=trained)
    monkeypatch.setattr(ablate.train, "train_and_evaluate", train)  # which knows its arguments
    monkeypatch.setattr(ablate.compilation_cache, "keep", lambda folder: None)
    monkeypatch.setattr(
        ablate.measured,
        "is_measured",
        lambda workdir, config: (workdir.path / "eval.json").exists(),
    )
    monkeypatch.setattr(ablate.grid, "cells", lambda config: cells())
    return train


def main(monkeypatch, tmp_path, **given):
    config = ConfigDict(
        {"recipe": "r.py", "variants": (("R0", ()), ("rewards alone", ("a=0", "b=1")))}
    )
    found = {"config": config, "workdir": str(tmp_path / "runs"), "out": str(tmp_path / "out.md")}
    values = mock.Mock(**({"jobs": 1, "only": None, "results": None} | found | given))
    monkeypatch.setattr(flags, "FLAGS", values)
    return ablate.main([])


def test_runs_are_trained_once_and_compared(tmp_path, monkeypatch, train):
    assert main(monkeypatch, tmp_path, only="rewards_alone/seed_1") == 0
    assert train.call_count == 1 and not (tmp_path / "out.md").exists()
    assert main(monkeypatch, tmp_path) == 0
    assert train.call_count == 4
    text = (tmp_path / "out.md").read_text("utf-8")
    assert "|  | base, 25 steps, guided | R0 | rewards alone |" in text
    assert "guided base, less 0.01 | +0.0000 | +0.0000 to +0.0000 | yes |" in text
    # 1/4 - 3/4 in pairs of -1, -1, 0, 0: the t interval has half a width of 0.919
    assert "| rewards alone | judge accuracy | -0.5000 | -1.4187 to +0.4187 | 0.286 |" in text
    assert "4 test prompts" in text and "seeds 0, 1" in text and "1. 红色的圆" in text
    assert "- **rewards alone**: `r.py`, `a=0`, `b=1`" in text
    assert images.load_png(tmp_path / "out.png").shape[0] > 3 * 8  # three rows
    assert "(out.png)" in text and "(out.curves.png)" in text
    curves = json.loads((tmp_path / "out.json").read_text("utf-8"))["curves"]
    assert list(curves) == list(VARIANTS) and set(curves["R0"][0]) == {
        "reward/clip",
        "heldout/clip",
    }
    assert [seed["heldout/clip"] for seed in curves["R0"]] == [[[40, 0.25]], [[40, 1.25]]]
    # 39 finite values in 20 parts of two, the last of one.
    assert curves["R0"][0]["reward/clip"][:2] == [[1.5, 0.15], [4, 0.4]]
    assert curves["R0"][0]["reward/clip"][-1] == [40, 4]


def test_a_page_is_written_again_from_its_results(tmp_path, monkeypatch, train):
    assert main(monkeypatch, tmp_path) == 0
    first = (tmp_path / "out.md").read_text("utf-8")
    shutil.rmtree(tmp_path / "runs")
    found = tmp_path / "out.json"
    there = {"config": None, "workdir": None, "results": str(found)}
    assert main(monkeypatch, tmp_path, **there) == 0
    assert (tmp_path / "out.md").read_text("utf-8") == first
    elsewhere = tmp_path / "other" / "page.md"  # without the picture
    assert main(monkeypatch, tmp_path, **there | {"out": str(elsewhere)}) == 0
    assert "Side by side" not in elsewhere.read_text("utf-8")
    assert "(page.curves.png)" in elsewhere.read_text("utf-8")
    bent = [
        json.dumps(json.loads(found.read_text("utf-8")) | {name: value})
        for name, value in [("curves", 3), ("models", {"R0": 1}), ("variants", [])]
    ]
    for text, said in [
        ("{", "is not the results file"),
        ('{"recipe": 1}', "no variants"),
        (json.dumps(json.loads(found.read_text("utf-8")) | {"models": {}}), "no models"),
        *((text, "is not whole") for text in bent),
    ]:
        found.write_text(text)
        with pytest.raises(InputError, match=said):
            main(monkeypatch, tmp_path, **there)
    with pytest.raises(InputError, match=r"give a \.md file"):  # it would replace the results
        main(monkeypatch, tmp_path, out=str(tmp_path / "out.json"))
    with pytest.raises(InputError, match="give --config and --workdir, or --results alone"):
        main(monkeypatch, tmp_path, config=None)


def test_curves_are_a_panel_a_metric(tmp_path):
    points = [[float(step), 0.1 * step] for step in range(5)]
    seed = {"heldout/clip": points, "norm/x0/rewards": points, "hacking/dark": points}
    # A seed that stopped early, and a variant that did not log a metric.
    curves = {"R0": [seed, seed | {"heldout/clip": points[:3]}], "alone": [{"reward/hps": points}]}
    drawn = training_curves.draw(curves)
    assert training_curves._names(curves) == ["heldout/clip", "reward/hps"]
    (tmp_path / "curves.png").write_bytes(drawn)
    assert images.load_png(tmp_path / "curves.png").std() > 0.05
    assert training_curves.draw({"R0": [{}]}) == b""


def test_a_sigterm_leaves_no_page(tmp_path, monkeypatch, train):
    train.side_effect = lambda config, workdir, stop: False
    assert main(monkeypatch, tmp_path) == STOPPED
    assert train.call_count == 1 and not (tmp_path / "out.md").exists()


def test_a_run_that_is_none(tmp_path, monkeypatch, train):
    with pytest.raises(InputError, match="R1/seed_0 is not a run of this ablation; they are R0/s"):
        main(monkeypatch, tmp_path, only="R1/seed_0")


@pytest.mark.parametrize("status", [0, 2, STOPPED])
def test_runs_are_spread_over_devices(tmp_path, monkeypatch, status):
    """Each in a process that sees one device; after a failure no other run begins."""
    program = (
        "import os, sys, time; time.sleep(0.05 if 'R0/seed_0' in sys.argv[-1] else 0.5); "
        f"open({str(tmp_path)!r} + '/' + sys.argv[-1].replace('/', '_'), 'w')"
        ".write(os.environ['CUDA_VISIBLE_DEVICES']); "
        f"sys.exit({status} * ('R0/seed_0' in sys.argv[-1]))"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess,
        "Popen",
        lambda command, env: start([sys.executable, "-c", program, *command[3:]], env=env),
    )
    monkeypatch.setattr(workers, "_POLL", 0.01)
    if status == 2:
        with pytest.raises(InputError, match=r"these runs failed.*R0/seed_0"):
            workers.run(cells(), 2, ["--flag"])
    else:
        assert workers.run(cells(), 2, ["--flag"]) is (status == 0)
    seen = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(seen.values()) == {"0", "1"}
    assert len(seen) == (4 if status == 0 else 2) and "--only=R0_seed_0" in seen


def test_versions_are_named():
    assert "jax" in results.versions()
