"""Tensors that stay in their files until they are placed, one at a time, on their devices.

Loading a pipeline or a reward gives a tree of `Lazy` leaves; who computes with it calls `place`.
So a host never holds more than one whole tensor besides the shards of its own devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Shaped

Index = tuple[slice, ...]  # one slice an axis, without steps


class Lazy:
    """Hold the shape and dtype of a tensor, and how to read a part of it.

    `leaf[index]` is that part in `dtype`; `np.asarray(leaf)` is the whole. `jax.jit` does not
    accept it: place it first.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[[Index, np.dtype], Shaped[np.ndarray, "..."]],
    ):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    def __getitem__(self, index: Index) -> Shaped[np.ndarray, "..."]:
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        return self._read(tuple(slice(a, b) for a, b, _ in bounds), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        leaf = self if dtype is None else self.astype(dtype)
        return leaf[(slice(None),) * len(self.shape)]

    def __repr__(self) -> str:
        return f"Lazy({self.dtype}{list(self.shape)})"

    def astype(self, dtype: Any) -> "Lazy":
        """Return the same tensor, rounded to `dtype` when it is read."""
        return Lazy(self.shape, dtype, self._read)


def computed(shape: tuple[int, ...], dtype: Any, value: Callable[[], np.ndarray]) -> Lazy:
    """Return a leaf that is computed as a whole whenever a part of it is read."""
    return Lazy(shape, dtype, lambda index, dtype: np.asarray(value()[index], dtype))


def place(
    tree: Any,
    sharding: Any = None,
    dtype: Any = None,
    placed: Callable[[], None] = lambda: None,
) -> Any:
    """Return `tree` as jax Arrays in `dtype` (by default their own).

    `sharding` is one for all leaves or a tree of them. By default leaves go to this process's
    first device, but arrays that are on devices already stay there. A leaf is on its devices
    before the next one is read, and every process reads what its own devices need. `placed` is
    called after each leaf, which may take minutes.

    Raises InputError for a file that is damaged or holds NaN or infinities.
    """
    if sharding is None or isinstance(sharding, Sharding):
        return jax.tree.map(lambda leaf: _place(leaf, sharding, dtype, placed), tree)
    return jax.tree.map(functools.partial(_place, dtype=dtype, placed=placed), tree, sharding)


def _place(
    leaf: Any, sharding: Sharding | None, dtype: Any, placed: Callable[[], None]
) -> jax.Array:
    if dtype is not None:
        leaf = leaf.astype(dtype)
    if not isinstance(leaf, Lazy):
        return jax.device_put(leaf, sharding)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    here = [
        [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
        for index in sharding.addressable_devices_indices_map(leaf.shape).values()
    ]
    first = [min(start for start, _, _ in axis) for axis in zip(*here, strict=True)]
    last = [max(stop for _, stop, _ in axis) for axis in zip(*here, strict=True)]
    # Read once, since devices need the same or interleaved bytes of the file.
    read = leaf[tuple(map(slice, first, last))]
    shard = functools.partial(_shard, read, leaf.shape, first)
    # Wait: transfers that are late would keep what they copy from.
    array = jax.make_array_from_callback(leaf.shape, sharding, shard).block_until_ready()
    placed()
    return array


def _shard(read: np.ndarray, shape: tuple[int, ...], first: list[int], index: Index) -> np.ndarray:
    """Return a part of a tensor of which `read` holds what begins at `first`."""
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    part = tuple(
        slice(a - start, b - start) for (a, b, _), start in zip(bounds, first, strict=True)
    )
    return np.asarray(read[part])  # NumPy makes something else of a scalar
