"""The small trained arrays of a transformer's blocks, stacked into one array for all blocks.

SDXL's adapters have 1,120 factors. An optimizer over them one by one is much of the program, both
to compile and to launch. So the jitted step stacks those of a transformer's blocks, under their
name with `*` for the block's number. Everything else sees them one by one.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

MOST_BYTES = 4 * 2**20  # larger arrays stay alone: stacking them costs memory, and they are sharded
# Z-Image calls its blocks layers, and those of an image or a caption alone refiners.
_BLOCK = re.compile(r"(?:(?<=transformer_blocks\.)|(?<=layers\.)|(?<=_refiner\.))(\d+)(?=\.)")

Params = dict[str, Shaped[Array, "..."]]


def groups(
    params: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct],
) -> dict[str, list[str]]:
    """Return {name of a stack: names of its arrays, of one shape and of blocks 0, 1, ...}.

    An array that stays alone keeps its name.
    """
    found: dict[str, list[str]] = {}
    for name in params:
        found.setdefault(_BLOCK.sub("*", name, count=1), []).append(name)

    def alike(key: str, names: list[str]) -> bool:
        kinds = {(params[name].shape, params[name].dtype) for name in names}
        small = params[names[0]].size * params[names[0]].dtype.itemsize <= MOST_BYTES
        return len(kinds) == 1 and small and set(names) == set(members(key, len(names)))

    result: dict[str, list[str]] = {}
    for key, names in found.items():
        if "*" in key and alike(key, names):
            result[key] = members(key, len(names))
        else:
            result |= {name: [name] for name in names}
    return result


def members(key: str, count: int) -> list[str]:
    """Return the names of the arrays of a stack of `count`, in order."""
    return [key.replace("*", str(i)) for i in range(count)]


def pack(tree: Any, groups: Mapping[str, list[str]]) -> Any:
    """Return `tree` with each dict of exactly the grouped names, at any depth, stacked."""
    names = {name for listed in groups.values() for name in listed}

    def is_params(x: Any) -> bool:
        return isinstance(x, dict) and x.keys() == names

    def stacked(x: Any) -> Any:
        if not is_params(x):
            return x
        return {
            key: jnp.stack([x[name] for name in listed]) if "*" in key else x[key]
            for key, listed in groups.items()
        }

    return jax.tree.map(stacked, tree, is_leaf=is_params)


def unpack(tree: Any) -> Any:
    """Undo `pack`."""

    def is_packed(x: Any) -> bool:
        return isinstance(x, dict) and any("*" in str(key) for key in x)

    def alone(x: Any) -> Any:
        if not is_packed(x):
            return x
        found = {}
        for key, value in x.items():
            found |= (
                dict(zip(members(key, len(value)), split(value), strict=True))
                if "*" in key
                else {key: value}
            )
        return found

    return jax.tree.map(alone, tree, is_leaf=is_packed)


def split(x: Shaped[Array, "n ..."]) -> list[Shaped[Array, "..."]]:
    """Return x[0], x[1], ... by one operation, whose gradient is one too."""
    return [part[0] for part in lax.split(x, [1] * len(x))]
