"""Copies of the same numbers on eight devices, one of which differs."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r0_jax.errors import InputError
from r0_jax.parallel import replicas, sharding


@pytest.fixture
def mesh():
    return sharding.make_mesh({"data": 4, "fsdp": 2})


def put(mesh, spec, changed=()):
    """[8, 3] on all devices; one bit is another one on the devices of these numbers."""
    where = NamedSharding(mesh, PartitionSpec(*spec))
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    pieces = []
    for device, index in where.devices_indices_map(whole.shape).items():
        piece = whole[index].copy()
        if device.id in changed:
            piece.view(np.uint32)[0, 1] ^= 1
        pieces.append(jax.device_put(piece, device))
    return jax.make_array_from_single_device_arrays(whole.shape, where, pieces)


@pytest.mark.parametrize("spec", [(), ("fsdp",), (("data", "fsdp"),), (None, None)])
def test_equal_copies_and_parts_are_no_difference(mesh, spec):
    replicas.check({"state": {"a": put(mesh, spec), "b": np.float32(1) * put(mesh, ())}}, 1)


@pytest.mark.parametrize("spec", [(), ("fsdp",)])
def test_one_bit_of_one_copy_is_seen(mesh, spec):
    trees = {"state": {"a": put(mesh, ())}, "weights": [put(mesh, spec, changed=[5])]}
    with pytest.raises(InputError, match="at step 7 the copy of the weights in process 0 of 1"):
        replicas.check(trees, 7)


@pytest.mark.parametrize(
    ("copies", "named"),
    [
        ([(0, 5), (1, 5)], []),
        ([(0, 5), (1, 6)], [0, 1]),
        ([(0, 5), (1, 6), (2, 5)], [1]),
        ([(0, 1), (0, 1), (1, 2), (1, 3), (2, 1)], [1]),
        ([(0, 1), (1, 2), (2, 3)], [0, 1, 2]),
    ],
)
def test_who_is_named(copies, named):
    assert replicas._outliers(copies) == named
