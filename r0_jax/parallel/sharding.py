"""Places arrays on a mesh of ('data', 'fsdp', 'tensor'), by the config's rules on dotted names.

The same code runs on one chip, on eight and on a pod: only the mesh of the config changes. Axes
are `AxisType.Auto` on purpose (`jax.make_mesh` defaults to Explicit since jax 0.9): the compiler
propagates shardings through the networks, whose code does not mention them.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from numpy.typing import NDArray

from r0_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # fsdp shards weights, not work; devices of one `tensor` share work
STRATEGIES = ("fsdp", "replicate", "column", "row")

# Below this an all-gather's latency costs more than the memory that sharding frees.
_MIN_BYTES = 4 * 2**20


@runtime_checkable
class Device(Protocol):
    """A jax.Device, or one that stands for it; of a TPU it also has a `slice_index`."""

    @property
    def platform(self) -> str:
        """Return its kind: "cpu", "gpu" or "tpu"."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
    """Make a mesh over all devices; -1 stands for the rest, a missing axis for 1.

    Neighbours of an axis are near each other, those of the last one nearest. TPUs of several
    slices follow each other on the data axis, the only one whose traffic (a sum of gradients a
    step) suits the data center's network.

    `devices` replaces `jax.devices()`, e.g. by those of a topology that is only compiled for.
    Raises InputError for sizes that do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := sorted(set(shape) - set(AXES)):
        raise InputError(
            f"mesh has no axis {unknown[0]!r}; its axes are {', '.join(AXES[:-1])} and {AXES[-1]}"
        )
    sizes = [shape.get(axis, 1) for axis in AXES]
    wanted = "mesh " + " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{wanted}: sizes are at least 1, and one of them may be -1 for the rest")
    known = prod(size for size in sizes if size != -1)
    if len(devices) % known or (known != len(devices) and -1 not in sizes):
        raise InputError(
            f"{wanted} does not fit {len(devices)} device(s); set one size to -1 "
            f"and the others to divisors of {len(devices)}"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(_arranged(devices, sizes, wanted), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: list[Device], sizes: list[int], wanted: str) -> NDArray:
    """Return the devices as an array of `sizes`, as near to each other as the hardware allows."""
    # GPUs number what NVLink joins as slices too, but any axis may go from host to host there.
    slices = (
        {getattr(device, "slice_index", 0) for device in devices}
        if devices[0].platform == "tpu"
        else {0}
    )
    data, *rest = sizes
    if data % len(slices):
        raise InputError(
            f"{wanted} does not fit {len(slices)} slices of {len(devices) // len(slices)} chips: "
            f"fsdp and tensor stay within a slice, so data must be a multiple of {len(slices)}; "
            "set data to -1"
        )
    within = [data // len(slices), *rest]
    # Some shapes lay an axis of the mesh over part of a physical one (2 x 2 x 2 on 2 x 4 chips).
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        within, [len(slices), 1, 1], devices, allow_split_physical_axes=True
    )


def global_mesh() -> Mesh:
    """Make a mesh of all devices of all processes, for work without a mesh in the config."""
    return make_mesh({"data": -1})


def local_mesh() -> Mesh:
    """Make a mesh of all devices of this process, for work that each process does by itself."""
    return make_mesh({"data": -1}, jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    rules: Sequence[object],
    heads: Mapping[str, int] | None = None,
) -> dict[str, NamedSharding]:
    """Return where each parameter lives, by the first rule whose regex is its whole dotted name.

    A rule is (regex, strategy):
      fsdp: of anything over 4 MB, split the largest axis that the mesh's fsdp axis divides.
      replicate: split nothing.
      column: split a layer's outputs over the tensor axis, and another axis as fsdp does.
      row: the same with its inputs.
    column and row are fsdp where the tensor axis does not divide the outputs or inputs. They also
    are where it does not divide the heads of the layer's attention (`heads`, as in `Network`).

    A regex matches whole names: one that is too narrow then fails as an uncovered name, while one
    that matched any part would silently take too much. Raises InputError for such a name.
    """
    compiled = [(_compile(regex), _known(strategy)) for regex, strategy in map(_pair, rules)]

    def spec(name: str, array: jax.ShapeDtypeStruct) -> PartitionSpec:
        strategy = next((strategy for regex, strategy in compiled if regex.fullmatch(name)), None)
        if strategy is None:
            raise InputError(
                f"no sharding rule covers {name}; end the rules with ('.*', 'fsdp') or "
                "('.*', 'replicate')"
            )
        return _spec(name, array, mesh, strategy, _heads_of(name, heads or {}))

    return {name: NamedSharding(mesh, spec(name, array)) for name, array in shapes.items()}


def follow_params(
    tree: PyTree,
    params: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    rules: Sequence[object],
    heads: Mapping[str, int] | None = None,
) -> PyTree:
    """Return the sharding of every leaf of a training state, a tree of shapes.

    EMA and optimizer moments follow their parameter, which the dotted name at the end of their
    path names; counters are replicated. `rules` and `heads` are those of `param_sharding`.
    """
    found = param_sharding(params, mesh, rules, heads)

    def find(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = getattr(path[-1], "key", None)
        if name in found and leaf.shape == params[name].shape:
            return found[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, tree)


def with_sharding(shapes: PyTree, sharding: PyTree) -> PyTree:
    """Return `shapes` (a tree of ShapeDtypeStruct) with their sharding."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis is split over all devices.

    The devices of one `tensor` hold the same samples, which they compute together.
    """
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Return into how many parts `batch_sharding` splits a batch."""
    return prod(mesh.shape[axis] for axis in BATCH_AXES)


def microbatches(batch_size: int, device_batch: int, mesh: Mesh) -> int:
    """Return into how many microbatches a global batch is cut.

    A device computes `device_batch` samples of it at once, 0 all of its share. Raises InputError
    where the batch does not split evenly.
    """
    if batch_size < 1 or device_batch < 0:
        raise InputError(
            f"batch_size={batch_size} must be at least 1, and device_batch="
            f"{device_batch} at least 0"
        )
    parts = batch_parts(mesh)
    share, rest = divmod(batch_size, parts)
    at_once = min(device_batch or share, share)
    if rest or share % at_once:
        unit = parts if rest else parts * at_once
        below = batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        tensor = mesh.shape["tensor"]
        raise InputError(
            f"batch_size={batch_size} does not split over {parts} "
            f"{'device(s)' if tensor == 1 else f'groups of {tensor} devices'}"
            + ("" if rest else f", {at_once} samples at a time (device_batch)")
            + f"; use {nearest}"
        )
    return share // at_once


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of microbatches [count, samples, ...]: each as `batch_sharding`."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def local_parts(split: NamedSharding) -> tuple[list[int], int]:
    """Return which parts of a batch this process's devices hold, in order, and how many there are.

    Another process holds the same where an axis that does not split the batch lies across both.
    """
    rows = split.mesh.size  # any number that splits
    size = split.shard_shape((rows,))[0]
    held = split.addressable_devices_indices_map((rows,)).values()
    starts = {index[0].indices(rows)[0] // size for index in held if index is not None}
    return sorted(starts), rows // size


def put_batch(batch: PyTree, split: NamedSharding) -> PyTree:
    """Put this process's share of the global batch on its devices.

    `batch` is a tree of numpy arrays: the parts that `local_parts` names.
    """
    parts, count = local_parts(split)

    def put(x: NDArray) -> jax.Array:
        size = len(x) // len(parts)

        def shard(index: tuple | None) -> NDArray:
            assert index is not None  # each device has a part
            start = parts.index(index[0].indices(size * count)[0] // size) * size
            return x[start : start + size]

        return jax.make_array_from_callback((size * count, *x.shape[1:]), split, shard)

    return jax.tree.map(put, batch)


def spread(function: Callable, mesh: Mesh) -> Callable:
    """Return the jit of function(params, *batch), whose result every process sees whole.

    The rows of the batch are split over `mesh` where it divides them (see `divisible`).
    """

    @jax.jit
    def run(params: PyTree, *batch: PyTree) -> PyTree:
        if len(jax.tree.leaves(batch)[0]) % batch_parts(mesh) == 0:
            batch = lax.with_sharding_constraint(batch, batch_sharding(mesh))
        return lax.with_sharding_constraint(function(params, *batch), replicated(mesh))

    return run


def divisible(size: int, mesh: Mesh) -> int:
    """Return the least number of rows from `size` on that the devices can split."""
    parts = batch_parts(mesh)
    return -(-size // parts) * parts


def any_process(flag: bool) -> jax.Array:
    """Return whether any process passes True, without waiting for it. All processes call it."""
    mesh = global_mesh()
    here = np.full(jax.local_device_count(), flag)
    flags = jax.make_array_from_process_local_data(batch_sharding(mesh), here)
    return _any(mesh)(flags)


@functools.cache
def _any(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.any, out_shardings=replicated(mesh))


def _pair(rule: object) -> tuple[str, str]:
    match rule:
        case [str(regex), str(strategy)]:
            return regex, strategy
    raise InputError(
        f"sharding rule {rule!r} is not a pair of a regular expression and "
        f"{' or '.join(STRATEGIES)}"
    )


def _compile(regex: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise InputError(f"sharding rule {regex!r} is not a regular expression: {error}") from None


def _known(strategy: str) -> str:
    if strategy not in STRATEGIES:
        raise InputError(f"sharding rule {strategy!r} is not one of {', '.join(STRATEGIES)}")
    return strategy


def _heads_of(name: str, heads: Mapping[str, int]) -> int:
    """Return the heads of the attention that a parameter is part of, 0 for none."""
    parts = name.split(".")
    return next(
        (heads[module] for i in range(len(parts)) if (module := ".".join(parts[:i])) in heads), 0
    )


def _spec(
    name: str, array: jax.ShapeDtypeStruct, mesh: Mesh, strategy: str, heads: int
) -> PartitionSpec:
    # The first axis of a stacked parameter ("blocks.*.kernel") is scanned over: never split it.
    axes = list(range(1 if "*" in name else 0, len(array.shape)))
    spec: list[str | None] = [None] * len(array.shape)
    size = array.size * array.dtype.itemsize

    # The last axis of a kernel, a bias or an embedding is the output. The axis before it is the
    # input of a kernel. Small ones are split too: it is the work that is split.
    of_tensor = {"column": axes[-1:], "row": axes[-2:-1]}.get(strategy, [])
    tensor = mesh.shape["tensor"]
    for axis in of_tensor:
        if tensor > 1 and array.shape[axis] % tensor == heads % tensor == 0:
            spec[axis] = "tensor"
            axes.remove(axis)
            size //= tensor

    fsdp = mesh.shape["fsdp"]
    axes = [axis for axis in axes if array.shape[axis] % fsdp == 0]
    if axes and fsdp > 1 and strategy != "replicate" and size > _MIN_BYTES:
        spec[max(axes, key=lambda axis: array.shape[axis])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
