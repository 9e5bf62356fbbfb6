"""Every network at its published width and depth, with random weights, against PyTorch.

Not among the tests of every day: gigabytes and minutes each. `make parity` runs those whose results
are not in runs/parity yet; `python tests/support/full_width.py NAME` runs one.
"""

import full_width
import parity
import pytest

pytestmark = pytest.mark.full_width
# Of scores, in their own units: 1 is a cosine's range, and ImageReward's standard deviation. Its
# two towers, 36 layers one after the other in bfloat16, round more.
BFLOAT16 = {"image_reward": 3e-2}


@pytest.mark.parametrize("name", full_width.CASES)
def test_parity(name):
    measured = full_width.measure(name)
    assert measured["output"] < full_width.OUTPUT
    if measured["gradient"] is not None:
        assert measured["gradient"] < full_width.CASES[name].gradient
    if "bfloat16 output" in measured:
        assert measured["bfloat16 output"] < BFLOAT16.get(name, 1e-2)
        assert measured["bfloat16 cosine"] > 0.99
    assert max(measured["torch GiB"], measured["jax GiB"]) < full_width.MOST_MEMORY


def test_taesd_of_pytorch_is_as_far_from_itself():
    """Rounding decides some of its ReLUs, whose gradient switches; hence what is allowed of it."""
    case = full_width.CASES["taesd"]
    found = full_width.in_torch(case)
    exact = full_width.in_torch(
        case._replace(
            theirs=lambda module, *inputs: [
                x.float() for x in case.theirs(module.double(), *(x.double() for x in inputs))
            ]
        )
    )
    parity.assert_close(found["output 0"], exact["output 0"], full_width.OUTPUT)
    parity.assert_close(
        found["gradient 0"],
        exact["gradient 0"],
        case.gradient,
        "gradient, PyTorch's float32 against its float64",
    )
    assert parity.MEASURED[-1].error > full_width.GRADIENT
