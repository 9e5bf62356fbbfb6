"""What `make results` makes of the eval.json of several seeds, whole ones and others."""

import json
import math
import types
from unittest import mock

import numpy as np
import pytest
from ml_collections import ConfigDict

from r0_jax import results
from r0_jax.evaluation import images
from r0_jax.evaluation.report import markdown_table
from r0_jax.evaluation.testbed import VALUES
from r0_jax.parallel.stop_signal import StopSignal
from r0_jax.workdir import checkpoint, identity
from r0_jax.workdir.workdir import LocalWorkdir


def evaluation(accuracy, distance, seed=0, prompts=2):
    def model(scale):
        return {
            "judge_accuracy": {"value": accuracy * scale, "ci95": [0.1, 0.9]},
            "frechet_distance": {
                "value": distance,
                "ci95": None if distance is None else [0.5 * distance, 2 * distance],
            },
        }

    return {
        "models": {"base_25_guided": model(1), "r0_4": model(0.5)},
        "prompts": prompts,
        "seed": seed,
        "checkpoint": "step 4",
        "test": {"num_prompts": prompts},
    }


def write_values(folder):
    ones = {f"{model}/judge_accuracy": np.ones(3, bool) for model in ("base_25_guided", "r0_4")}
    np.savez(folder / VALUES, **ones)


def test_seeds_are_pooled_and_their_intervals_joined():
    pooled = results.pool([evaluation(0.8, 1.0), evaluation(0.6, 3.0)])["models"]
    assert pooled["base_25_guided"]["judge_accuracy"]["value"] == pytest.approx(0.7)
    assert pooled["r0_4"]["frechet_distance"] == {"value": 2.0, "ci95": [0.5, 6.0]}


def test_a_value_that_is_null_is_not_finite_in_the_table():
    evaluations = [evaluation(0.8, 1.0), evaluation(0.6, None)]
    pooled = results.pool(evaluations)
    assert math.isnan(pooled["models"]["r0_4"]["frechet_distance"]["value"])
    table = markdown_table(pooled)
    assert "| Frechet distance ↓ | not finite | not finite |" in table and "0.7" in table


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder of a finished run, and its config."""
    monkeypatch.setattr(checkpoint, "steps", lambda workdir: [4])
    monkeypatch.setattr(identity, "check_same_run", lambda workdir, config: "")
    opened = types.SimpleNamespace(choose_step=lambda: 4)
    monkeypatch.setattr(results.run, "open_run", lambda workdir: opened)
    return LocalWorkdir(tmp_path), ConfigDict({"steps": 4, "seed": 0, "test": {"num_prompts": 2}})


@pytest.mark.parametrize(
    "text, said",
    [
        (json.dumps(evaluation(0.8, 1.0)), True),
        (json.dumps(evaluation(0.8, None)), True),  # measured, and not finite
        (json.dumps(evaluation(0.8, 1.0, seed=1)), False),
        (json.dumps(evaluation(0.8, 1.0, prompts=3)), False),
        (json.dumps(evaluation(0.8, 1.0) | {"checkpoint": "step 2"}), False),
        (json.dumps({k: v for k, v in evaluation(0.8, 1.0).items() if k != "test"}), False),
        (json.dumps(evaluation(0.8, 1.0))[:-40], False),
        ("", False),
        ("[]", False),
        ('{"prompts": 2}', False),
        ("null", False),
        ('{"models": {"r0_4": null}, "prompts": 2}', False),
    ],
)
def test_what_is_broken_is_measured_anew(run, text, said):
    workdir, config = run
    assert not results.measured(workdir, config)
    (workdir.path / "eval.json").write_text(text, encoding="utf-8")
    assert not results.measured(workdir, config)  # its values are missing
    (workdir.path / VALUES).write_bytes(b"PK, and no more")
    assert not results.measured(workdir, config)
    write_values(workdir.path)
    assert results.measured(workdir, config) is said


def test_seeds_are_trained_one_after_the_other_and_written_down(tmp_path, monkeypatch):
    def trained(config, workdir, stop):
        folder = workdir.path
        found = evaluation(0.8, 1.0, config.seed, config.test.num_prompts)
        (folder / "samples" / "eval").mkdir(parents=True)
        (folder / "eval.json").write_text(json.dumps(found), encoding="utf-8")
        write_values(folder)
        images.save_png(folder / "samples" / "eval" / "0.png", np.zeros((8, 8, 3)))
        record = {"prompt": "红色的圆", "files": dict.fromkeys(found["models"], "0.png")}
        (folder / "samples" / "eval" / "prompts.jsonl").write_text(json.dumps(record), "utf-8")
        return True

    train = mock.create_autospec(results.train.train_and_evaluate, side_effect=trained)
    monkeypatch.setattr(results.train, "train_and_evaluate", train)  # which knows its arguments
    config = ConfigDict({"steps": 4, "seed": 7, "test": {"num_prompts": 2}})
    workdirs = [LocalWorkdir(tmp_path / f"seed_{seed}") for seed in (0, 1)]
    assert results.run_all(config, [0, 1], workdirs, tmp_path / "results.md", StopSignal())
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "guided base, less 0.01 | +0.0000 | +0.0000 to +0.0000 | yes |" in text
    assert "2 test prompts" in text and "seeds 0, 1" in text and "1. 红色的圆" in text
    assert (tmp_path / "results.png").is_file()

    train.side_effect = lambda config, workdir, stop: False  # a SIGTERM came
    workdirs = [LocalWorkdir(tmp_path / "seed_2")] * 2
    assert not results.run_all(config, [2, 3], workdirs, tmp_path / "no.md", StopSignal())
    assert train.call_count == 3 and not (tmp_path / "no.md").exists()
