"""The campaign of `make faults` in short: each kind of fault once or a few times."""

import random

import faults
import pytest
from fault_world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("faults"), steps=10)


# Full disks are test_checkpoint.py's and test_metrics.py's, in one process.
SHORT = faults.Counts(kills=2, damages=6, damaged_runs=0, stops=1, meshes=1)


@pytest.mark.parametrize("section", ["meshes", "damages", "stops", "kills"])
def test_a_few_of_each(world, section):
    rows = faults.SECTIONS[section](world, SHORT, random.Random(3))
    assert [what for row in rows for what in row.wrong] == []
    assert all(row.found for row in rows)
