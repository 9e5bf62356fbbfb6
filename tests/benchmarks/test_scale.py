"""The table of what fits: from stored plans, and from the document that holds them."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import measure, scale
from r0_jax.plan.plan import Bounds, Memory, Plan

DOCUMENT = Path(__file__).parents[2] / "docs" / "reports" / "scale.md"
PLAN = Plan(
    topology="v5e-16",
    chips=16,
    batch_size=16,
    flops_per_step=1234e12,
    model_flops_per_step=1000e12,
    memory=Memory(True, "training step", 3.0 * 2**30, 16.0 * 2**30, {"activations": 3.0 * 2**30}),
    programs=[],
    evaluation=False,
    bounds=Bounds(
        5e9, {"all-gather": 2e9, "all-reduce": 1.5e9}, 0.0, {"hbm": 1.0}, "hbm", 16.0, 0.5
    ),
    measured=None,
    trace_seconds=1.0,
    compile_seconds=70.0,
    host_bytes=8e9,
    suggestions=[],
)
FIRST = "| SD 1.5, 512 px | LoRA R0+ | v5e-16 |"


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "_RESULTS", tmp_path)
    monkeypatch.setattr(measure, "machine", lambda *packages: "A machine.")

    def write(name, plan):
        (tmp_path / f"{name}.json").write_text(json.dumps(dataclasses.asdict(plan)), "utf-8")

    return write


def test_the_document_that_is_here_makes_itself_again(store):
    section = measure.read_section(DOCUMENT, scale._HEADING)
    kept = scale.Kept.of(section)
    assert kept.rows == {row.name for row in scale.rows()}  # so nothing is compiled again
    assert scale.document(kept) == section


def test_a_plan_takes_the_place_of_its_row(store):
    section = measure.read_section(DOCUMENT, scale._HEADING)
    store("sd15-lora-r0plus-v5e-16", PLAN)
    made = scale.document(scale.Kept.of(section))
    new = [line for line in made.splitlines() if line not in section]
    assert new == [
        f"{FIRST} 3.0 of 16.0 | yes | 1,234 | 5 | 3.5 | HBM | 16.0 | 50% | 70 | 8.0 |",
        "A machine.",
    ]
    assert len(made.splitlines()) == len(section.splitlines())


def test_weak_scaling_needs_both_rows_and_the_rest_is_still_to_do(store):
    store("weak-8", PLAN)
    nothing = scale.Kept.of("")
    assert "Weak scaling" not in scale.document(nothing)
    bounds = dataclasses.replace(PLAN.bounds, sent_bytes={"all-gather": 7e9})
    store("weak-256", dataclasses.replace(PLAN, bounds=bounds))
    made = scale.document(nothing)
    assert "3.50 GB a step among 8 chips and 7.00 GB among 256, +100.0%." in made
    assert "2 of 29 programs were compiled so far" in made


def test_a_plan_without_bounds_and_one_of_another_plan(store, tmp_path):
    name = "sd15-lora-r0plus-v5e-16"
    memory = dataclasses.replace(PLAN.memory, fits=False)
    store(name, dataclasses.replace(PLAN, memory=memory, bounds=None))
    made = scale.document(scale.Kept.of(""))
    assert f"{FIRST} 3.0 of 16.0 | **no** | 1,234 | - | - | - | - | - | 70 | 8.0 |" in made
    for text in ("", '{"topology": "v5e-16"}', "[1]", '{"memory": 1}'):
        (tmp_path / f"{name}.json").write_text(text, "utf-8")
        assert FIRST not in scale.document(scale.Kept.of(""))
