import json
import math

from r0_jax.training.early_stop import EarlyStop


def due(values, patience, tmp_path, **earlier):
    early = EarlyStop("m", patience, tmp_path, earlier.get("step", -1))
    return [early.add(value) or early.due for value in values]


def test_it_is_due_after_so_many_evaluations_without_a_new_best(tmp_path):
    values = [1.0, 2.0, 2.0, 1.5, 3.0, math.nan, 2.9, 3.1]
    assert due(values, 2, tmp_path) == [False, False, False, True, False, False, True, False]
    assert due(values, 0, tmp_path) == [False] * 8
    assert due([math.nan] * 2, 2, tmp_path) == [False, True]


def test_a_run_that_continues_counts_from_its_file(tmp_path):
    lines = [
        {"step": 0, "m": 1.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "m": 2.0},
        {"step": 4, "m": 1.9},
        {"step": 6, "m": 5.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")
    assert due([1.9, 1.8], 3, tmp_path, step=4) == [False, True]
    assert due([1.9], 1, tmp_path, step=6) == [True]
    assert due([2.1], 1, tmp_path, step=4) == [False]
    vetoed = [x | {"hacking/vetoed": float(x.get("m") == 2.0)} for x in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in vetoed), "utf-8")
    assert due([1.95], 1, tmp_path, step=4) == [False]  # 1.9 was the best
