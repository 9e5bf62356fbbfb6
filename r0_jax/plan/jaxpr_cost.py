"""The floating-point operations of a traced program, counted in its jaxpr.

Compilers count the body of a loop once, whatever its length, and know nothing about kernels. Here a
`scan` counts as often as it is long, and a `while` as often as the caller expects. Only matrix
products and convolutions count: two operations for a multiplication and its addition.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def flops(jaxpr: core.Jaxpr, while_trips: float = 1.0, repeated: int = 1) -> float:
    """Return the operations of one run of the whole program, over all devices.

    `while_trips` is how often each `while` of unknown length goes round on average. The costliest
    branch of a `cond` counts. `repeated` is how many devices do the same, apart from what
    `shard_map` gives to each.
    """
    return float(sum(_of(eqn, while_trips, repeated) for eqn in jaxpr.eqns))


def _of(eqn: Any, trips: float, repeated: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return (
            repeated
            * 2.0
            * eqn.outvars[0].aval.size
            * math.prod(shape[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        # The gradient of a stride puts zeros between what it reads.
        each = math.prod(kernel) / kernel[outputs] / math.prod(params["lhs_dilation"])
        return repeated * 2.0 * eqn.outvars[0].aval.size * each
    if name == "shard_map":
        repeated = 1
    inner = [flops(jaxpr, trips, repeated) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while":
        return trips * sum(inner)
    if name == "shard_map":
        return params["mesh"].size * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return float(sum(inner))


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for leaf in jax.tree.leaves(params, is_leaf=_is_jaxpr):
        if _is_jaxpr(leaf):
            yield getattr(leaf, "jaxpr", leaf)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)
