"""Checks that copies of the same numbers are equal on all devices, by sums over each copy."""

import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree, UInt32
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.parallel import checksum

# Sets of devices that hold the same shards: all devices for a replicated array, those that differ
# in no axis that splits it for another.
Groups = tuple[tuple[int, ...], ...]


def check(trees: Mapping[str, PyTree], step: int) -> None:
    """Raise InputError, in all processes, where copies of the same numbers differ.

    It names the processes whose copy differs from that of most devices, and the one of `trees`
    (of global arrays) that it is in. Such a difference never goes away and never shows in the
    loss. It comes from a defect of memory or of a link, or from weights that differ by machine.
    """
    totals: dict[tuple[str, Groups], dict[int, int]] = {}
    for what, tree in trees.items():
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
                continue
            weight = zlib.crc32(jax.tree_util.keystr(path).encode()) | 1
            total = totals.setdefault((what, _groups(array)), {})
            for shard in array.addressable_shards:
                here = int(checksum.of_array(shard.data)) * weight
                total[shard.device.id] = (total.get(shard.device.id, 0) + here) % 2**32
    local = [device.id for device in jax.local_devices()]
    sums = np.asarray([[total[i] for i in local] for total in totals.values()], np.uint32)
    everywhere = _gather(sums)  # [processes, len(totals), devices of one]
    ids = _gather(np.asarray(local, np.uint32))
    for row, (what, groups) in enumerate(totals):
        found = {int(ids[p, d]): (p, int(everywhere[p, row, d])) for p, d in np.ndindex(ids.shape)}
        for group in groups:
            if differing := _outliers([found[i] for i in group]):
                names = " and ".join(map(str, differing))
                kind = "process" if len(differing) == 1 else "processes"
                raise InputError(
                    f"at step {step} the copy of the {what} in {kind} {names} of "
                    f"{jax.process_count()} differs from the others': look at the hardware and the "
                    "files there; the last checkpoint is from before"
                )


def _outliers(copies: Sequence[tuple[int, int]]) -> list[int]:
    """Return the processes of (process, sum) outside the majority; all of them if there is none."""
    sums = [value for _, value in copies]
    if len(set(sums)) == 1:
        return []
    ranked = sorted(set(sums), key=sums.count)
    most = None if sums.count(ranked[-1]) == sums.count(ranked[-2]) else ranked[-1]
    return sorted({process for process, value in copies if value != most})


def _groups(array: jax.Array) -> Groups:
    holders: dict[tuple, list[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        key = tuple((part.start, part.stop) for part in index)
        holders.setdefault(key, []).append(device.id)  # type: ignore[attr-defined]  # jaxlib has no stubs
    return tuple(tuple(sorted(ids)) for ids in sorted(holders.values()))


def _gather(values: UInt32[NDArray[np.uint32], "..."]) -> UInt32[NDArray[np.uint32], "p ..."]:
    return np.asarray(multihost_utils.process_allgather(values)).reshape(-1, *values.shape)
