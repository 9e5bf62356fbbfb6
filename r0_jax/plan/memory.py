"""The bytes that lie on a chip, and those that the compiler asks for."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval

from r0_jax.training.program import Program


def held(built: Program) -> dict[str, Any]:
    """Return the shapes of what lies on the devices from step to step, by kind."""
    state, frozen = built.abstract_state, built.abstract_frozen
    rest = state._replace(params={}, ema_params={}, fake=())
    networks = {name: part for name, part in frozen.items() if name not in ("rewards", "empty")}
    return {
        "parameters": state.params,
        "ema": state.ema_params,
        "optimizer": rest,
        **({"fake score": state.fake} if state.fake else {}),
        **{f"frozen {name}": part for name, part in networks.items()},
        **{f"frozen {name}": part for name, part in frozen["rewards"].items()},
    }


def bytes_by_kind(held: Mapping[str, Any]) -> dict[str, float]:
    """Return the bytes of one chip of each kind of shapes with sharding."""
    return {
        kind: float(sum(map(_shard_bytes, jax.tree.leaves(tree)))) for kind, tree in held.items()
    }


def beside(program: Jaxpr, arguments: Any, held: Mapping[str, Any]) -> float:
    """Return the bytes of one chip that a program finds there and does not read.

    They lie there while it runs, but the compiler does not know of them, or drops them from its own
    count. Such are the optimizer while images are drawn, and the VAE's encoder in a step. What
    is held and what is an argument is the same where the objects are.
    """
    _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    leaves = jax.tree.leaves(arguments)
    read = {id(leaf) for leaf, is_used in zip(leaves, used, strict=True) if is_used}
    return float(sum(_shard_bytes(x) for x in jax.tree.leaves(held) if id(x) not in read))


def needed(said: str) -> float | None:
    """Return the bytes that a chip needs, arguments included, by the TPU compiler's error message.

    Return None where the message is about something else than memory.
    """
    match = re.search(r"(?:HLO temporaries \(?|Used )([\d.]+)([KMG])(?! of \S+ [sv]mem)", said)
    return match and float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]


def _shard_bytes(x: jax.ShapeDtypeStruct) -> float:
    return float(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize)
