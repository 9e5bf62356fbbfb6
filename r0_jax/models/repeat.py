"""Blocks one after the other: how they compile, and what they keep for the gradient.

Identical blocks (SDXL's ten at a level, SD3's 23, a ViT's 32) can be one loop of the program, which
compiles several times faster. Their parameters are stored one by one and stacked where the loop
begins. Each block can also keep only its input for the backward pass, which then computes the block
again. The choice belongs to the traced program: the training step and sampling each make their own
(`use`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from ml_collections import ConfigDict

from r0_jax.models.choice import Choice


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Say how blocks compile.

    Attributes:
      scan: whether identical neighbours become one loop.
      remat: whether the backward pass computes each block again from its input.
      gathered: the sharding that a block's parameters get before it computes, where they are split
        over devices ("fsdp"). Without it the compiler splits the block's computation instead, and
        sends activations.
    """

    scan: bool = False
    remat: bool = False
    gathered: Sharding | None = None


def of_config(config: ConfigDict, mesh: Mesh) -> Repeat:
    """Return how the blocks of a run's networks compile on a mesh."""
    split = mesh.shape["fsdp"] > 1 and mesh.size == mesh.shape["data"] * mesh.shape["fsdp"]
    gathered = NamedSharding(mesh, PartitionSpec()) if split else None
    return Repeat(config.scan_blocks, config.remat == "blocks", gathered)


PLAIN = Repeat()
_chosen = Choice("repeat", PLAIN)
use = _chosen.use  # sets the choice of every `repeat` that is traced meanwhile


def repeat(blocks: Sequence[nnx.Module], call: Callable[[nnx.Module, Any], Any], x: Any) -> Any:
    """Return call(blocks[-1], ... call(blocks[0], x)); one block hands `x` to the next."""
    choice = _chosen.get()
    if choice == PLAIN:
        for block in blocks:
            x = call(block, x)
        return x
    split = [nnx.split(block) for block in blocks]
    # Of neighbours some may have adapters and others not.
    for (graphdef, _), run in itertools.groupby(
        split, key=lambda pair: (pair[0], jax.tree.structure(pair[1]))
    ):
        states = [state for _, state in run]

        def one(x, state, graphdef=graphdef):
            if choice.gathered is not None:
                state = jax.tree.map(lambda leaf: _gather(leaf, choice.gathered), state)
            return call(nnx.merge(graphdef, state), x)

        if choice.remat:  # a loop's body cannot be merged with the forward pass
            one = jax.checkpoint(one, prevent_cse=not choice.scan or len(states) == 1)
        if choice.scan and len(states) > 1:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            x, _ = lax.scan(lambda x, state, one=one: (one(x, state), None), x, stacked)
        else:
            for state in states:
                x = one(x, state)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, sharding: Sharding) -> jax.Array:
    return lax.with_sharding_constraint(x, sharding)


# The gradient can be split again at once, as the parameter is.
_gather.defvjp(lambda x, sharding: (_gather(x, sharding), None), lambda sharding, _, grad: (grad,))
