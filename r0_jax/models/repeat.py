"""Blocks one after the other: how they are compiled, and what of them is kept for the gradient.

Identical blocks (SDXL's ten at a level, SD3's 23, a ViT's 32) can be written into the program once
and looped over, which compiles several times faster; their parameters, which are stored one by one,
are stacked where the loop begins. And each block can keep nothing but its input for the backward
pass, which then computes the block a second time. The choice belongs to the program that is being
traced: the training step and sampling each make theirs (`use`).
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
from jax.sharding import Sharding

from r0_jax.models.choice import Choice


@dataclasses.dataclass(frozen=True)
class Repeat:
    """The choice.

    Attributes:
      scan: identical neighbours become one loop.
      remat: the backward pass computes each block again from its input.
      gathered: where a block's parameters are brought before it computes, of parameters that are
        split over devices ("fsdp"): left to itself the compiler splits the block's computation
        instead, and sends activations.
    """

    scan: bool = False
    remat: bool = False
    gathered: Sharding | None = None


PLAIN = Repeat()
_chosen = Choice("repeat", PLAIN)
use = _chosen.use  # makes a choice that of every `repeat` that is traced meanwhile


def repeat(blocks: Sequence[nnx.Module], call: Callable[[nnx.Module, Any], Any], x: Any) -> Any:
    """call(blocks[-1], ... call(blocks[0], x)): `x` is what one block hands to the next."""
    choice = _chosen.get()
    if choice == PLAIN:
        for block in blocks:
            x = call(block, x)
        return x
    split = [nnx.split(block) for block in blocks]
    for graphdef, run in itertools.groupby(split, key=lambda pair: pair[0]):
        states = [state for _, state in run]

        def one(x, state, graphdef=graphdef):
            if choice.gathered is not None:
                state = jax.tree.map(lambda leaf: _gather(leaf, choice.gathered), state)
            return call(nnx.merge(graphdef, state), x)

        if choice.remat:  # a loop's body needs no guard against being merged with the forward pass
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


# The gradient is free to be split again at once, as the parameter is.
_gather.defvjp(lambda x, sharding: (_gather(x, sharding), None), lambda sharding, _, grad: (grad,))
