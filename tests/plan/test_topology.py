import pytest

from r0_jax.errors import InputError
from r0_jax.plan import topology


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9-8", "unknown: use a TPU slice such as v5e-16"),
        ("v5e", "unknown"),
        ("h100-8", "unknown"),
        ("v5e-17", "is not known here; known are v5e-1, v5e-4"),
        ("v5p-7", "not known here"),
        ("v6e-512", "not known here"),
        ("v5e-0", "not known here"),
        ("0xv5e-16", "unknown"),
    ],
)
def test_slices_that_are_none(name, said):
    with pytest.raises(InputError, match=said):
        topology.find(name)


@pytest.mark.parametrize(
    ("name", "chips", "slices"),
    [
        ("v5e-16", 16, 1),
        ("v5p-8", 4, 1),
        ("v6e-8", 8, 1),
        ("v4-8", 4, 1),
        ("2xv5e-4", 8, 2),
        ("v5litepod-16", 16, 1),
    ],
)
def test_slices_as_google_names_them(name, chips, slices):
    pytest.importorskip("libtpu", reason="the TPU compiler is in requirements-tpu.txt")
    chip, devices = topology.find(name)
    assert chip.name in name.replace("litepod", "e") and len(devices) == chips
    assert len({getattr(device, "slice_index", 0) for device in devices}) == slices
