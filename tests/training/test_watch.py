"""The report of a running training: written at evaluations, while that costs little."""

import itertools

import pytest

from r0_jax.evaluation import report
from r0_jax.training import watch


def test_the_report_is_written_unless_it_costs_much(tmp_path, monkeypatch):
    clock, written = [100.0], []

    def write_report(folder):
        written.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(report, "write_report", write_report)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    watched = watch.Watch(tmp_path)
    for _ in range(30):  # an evaluation every ten seconds
        watched.write()
        clock[0] += 10.0
    assert written[0] == 100.0
    assert all(later - earlier >= 2.0 * 50 for earlier, later in itertools.pairwise(written))
    assert len(written) == 3


def test_a_broken_table_of_an_earlier_end_does_not_end_the_training(tmp_path):
    (tmp_path / "eval.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"not written: .*eval\.json"):
        watch.Watch(tmp_path).write()
