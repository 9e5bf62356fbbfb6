"""The bytes that a chip holds from step to step, and those that the compiler asks for."""

import math
import re

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval

from r0_jax.training.program import Program


def bytes_by_kind(built: Program) -> dict[str, float]:
    """Return the bytes that lie on one chip from step to step."""
    state, frozen, batch, _ = built.abstract
    rest = state._replace(params={}, ema_params={})
    networks = {name: part for name, part in frozen.items() if name not in ("rewards", "empty")}
    kinds = {
        "parameters": state.params,
        "ema": state.ema_params,
        "optimizer": rest,
        **{f"frozen {name}": part for name, part in networks.items()},
        **{f"frozen {name}": part for name, part in frozen["rewards"].items()},
        "batch": batch,
    }
    return {
        kind: float(sum(map(_shard_bytes, jax.tree.leaves(tree)))) for kind, tree in kinds.items()
    }


def unused_bytes(step: Jaxpr, built: Program) -> float:
    """Return the bytes on one chip of weights that the step takes and never reads.

    They lie there while it runs, but the compiler drops them from its own count. Such are the
    VAE's encoder and the last layers of text encoders.
    """
    _, used = partial_eval.dce_jaxpr(step, [True] * len(step.outvars))
    leaves = jax.tree.leaves(built.abstract)
    return float(
        sum(_shard_bytes(x) for x, is_used in zip(leaves, used, strict=True) if not is_used)
    )


def needed(said: str) -> float | None:
    """Return the bytes that a chip needs, arguments included, by the TPU compiler's error message.

    Return None where the message is about something else than memory.
    """
    match = re.search(r"(?:HLO temporaries \(?|Used )([\d.]+)([KMG])(?! of \S+ [sv]mem)", said)
    return match and float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]


def _shard_bytes(x: jax.ShapeDtypeStruct) -> float:
    return float(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize)
