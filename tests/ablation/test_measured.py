"""What is read of the eval.json of several runs, whole ones and others."""

import json
import math
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from r0_jax.ablation import measured
from r0_jax.ablation.grid import Cell
from r0_jax.ablation.measured import Measured
from r0_jax.evaluation.result_table import markdown_table
from r0_jax.evaluation.results import VALUES
from r0_jax.workdir import checkpoint, identity
from r0_jax.workdir.workdir import LocalWorkdir

GUIDED = "base_25_guided"


def evaluation(accuracy, distance, seed=0, prompts=2, models=(GUIDED, "r0_4")):
    def model(scale):
        return {
            "judge_accuracy": {"value": accuracy * scale, "ci95": [0.1, 0.9]},
            "frechet_distance": {
                "value": distance,
                "ci95": None if distance is None else [0.5 * distance, 2 * distance],
            },
        }

    return {
        "models": {name: model(1 / (1 + i)) for i, name in enumerate(models)},
        "prompts": prompts,
        "seed": seed,
        "checkpoint": "step 4",
        "test": {"num_prompts": prompts},
    }


def one(variant, seed, values, **options):
    models = (GUIDED, "r0_4") if variant == "R0" else ("r0_4",)
    arrays = {f"{model}/judge_accuracy": np.asarray(values) for model in models}
    cell = Cell(variant, seed, ConfigDict())
    return Measured(cell, evaluation(0.8, 1.0, seed, models=models, **options), arrays)


def test_columns_are_the_bases_and_a_generator_a_variant():
    found = [one(name, seed, [seed, 1.0]) for seed in (0, 1) for name in ("R0", "alone")]
    columns = measured.columns(found)
    assert list(columns) == [GUIDED, "R0", "alone"]
    assert [len(seeds) for seeds in columns.values()] == [2, 2, 2]
    first, second = measured.by_seed(found)
    assert set(first) == {f"{name}/judge_accuracy" for name in columns}
    np.testing.assert_array_equal(second["alone/judge_accuracy"], [1.0, 1.0])


def test_seeds_are_pooled_and_their_intervals_joined():
    seeds = [evaluation(0.8, 1.0)["models"][GUIDED], evaluation(0.6, 3.0)["models"][GUIDED]]
    pooled = measured.pool(seeds)
    assert pooled["judge_accuracy"]["value"] == pytest.approx(0.7)
    assert pooled["frechet_distance"] == {"value": 2.0, "ci95": [0.5, 6.0]}


def test_a_value_that_is_null_is_not_finite_in_the_table():
    seeds = [evaluation(0.8, 1.0)["models"][GUIDED], evaluation(0.6, None)["models"][GUIDED]]
    pooled = measured.pool(seeds)
    assert math.isnan(pooled["frechet_distance"]["value"])
    table = markdown_table({"models": {GUIDED: pooled}})
    assert "| Frechet distance ↓ | not finite |" in table and "0.7" in table


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder of a finished run, and its config."""
    monkeypatch.setattr(checkpoint, "steps", lambda workdir: [4])
    monkeypatch.setattr(identity, "check_same_run", lambda workdir, config: "")
    opened = types.SimpleNamespace(choose_step=lambda: 4)
    monkeypatch.setattr(measured.run, "open_run", lambda workdir: opened)
    fields = {"steps": 4, "early_stop": 0, "seed": 0, "test": {"num_prompts": 2}}
    return LocalWorkdir(tmp_path), ConfigDict(fields)


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
    assert not measured.is_measured(workdir, config)
    (workdir.path / "eval.json").write_text(text, encoding="utf-8")
    assert not measured.is_measured(workdir, config)  # its values are missing
    (workdir.path / VALUES).write_bytes(b"PK, and no more")
    assert not measured.is_measured(workdir, config)
    np.savez(workdir.path / VALUES, **{"r0_4/judge_accuracy": np.ones(3, bool)})
    assert measured.is_measured(workdir, config) is said
    with config.unlocked():
        config.steps = 8  # not trained to its end, unless by an early stop
    assert not measured.is_measured(workdir, config)
    with config.unlocked():
        config.early_stop = 2
    assert measured.is_measured(workdir, config) is said
