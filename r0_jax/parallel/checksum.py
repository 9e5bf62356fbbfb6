"""Checksums of arrays, for checkpoints.

Orbax protects its indices but not the array data, where it reads a flipped bit as a number.
"""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


def of_fields(arrays: Mapping) -> dict[str, int]:
    """Return {field of TrainState: a number that any changed bit changes}, the same on every mesh.

    `arrays` has dotted names that begin with the field. Looking one up may read it from a file, so
    its type is not subscripted: the tests' type checks look a value up.
    """
    totals: dict[str, int] = {}
    for name, x in arrays.items():
        # Wait for each: with thousands in the queue, sums over many fake devices on few processors
        # block each other for ever.
        value = int(of_array(x)) * (zlib.crc32(name.encode()) | 1)
        field = name.split(".")[0]
        totals[field] = (totals.get(field, 0) + value) % 2**32
    return totals


@jax.jit
def of_array(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Return a number that any changed bit changes, the same on every mesh."""
    # Integer sums are exact in any order, so each device sums what it has. The weights are odd and
    # differ by position, so that a flipped bit and a swapped pair both show.
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
