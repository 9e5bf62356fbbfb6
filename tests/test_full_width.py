"""Every network at its published width and depth, with random weights, against PyTorch.

Not among the tests of every day: gigabytes and minutes each. `make parity` runs those whose results
are not in runs/parity yet; `python tests/full_width.py NAME` runs one.
"""

import full_width
import pytest

pytestmark = pytest.mark.full_width


@pytest.mark.parametrize("name", full_width.CASES)
def test_parity(name):
    measured = full_width.measure(name)
    assert measured["output"] < full_width.OUTPUT
    if measured["gradient"] is not None:
        assert measured["gradient"] < full_width.CASES[name].gradient
    if "bfloat16 output" in measured:
        assert measured["bfloat16 output"] < 1e-2
        assert measured["bfloat16 cosine"] > 0.99
    assert max(measured["torch GiB"], measured["jax GiB"]) < full_width.MOST_MEMORY
