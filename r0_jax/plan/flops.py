"""The floating-point operations of a program's step, over all chips."""

import copy
from typing import NamedTuple

import jax
from jax.stages import Traced
from ml_collections import ConfigDict

from r0_jax.method import reward_step
from r0_jax.plan import jaxpr_cost
from r0_jax.training.program import Program


class Flops(NamedTuple):
    """All operations that are executed, and those of the model, which computes nothing twice."""

    executed: float
    model: float


def of_step(built: Program, traced: Traced) -> Flops:
    """Return the operations of a program's step; `traced` is that step."""
    trips = expected_trips(built.config)
    executed = jaxpr_cost.flops(traced.jaxpr.jaxpr, trips, repeated(built))
    return Flops(executed, _model(built, trips))


def expected_trips(config: ConfigDict) -> float:
    """Return how often the one loop of drawn length goes round on average.

    It makes the network calls before the rewarded one, where that is drawn.
    """
    return reward_step.mean_before(config) if reward_step.is_random(config) else 1.0


def _model(built: Program, trips: float) -> float:
    """Count a step that computes nothing twice and fills up no tiles."""
    plain = copy.deepcopy(built.config)
    plain.remat, plain.attention = "none", "xla"
    other = built.changed(config=plain)
    return jaxpr_cost.flops(other.step.trace(*other.abstract).jaxpr.jaxpr, trips)


def repeated(built: Program) -> int:
    """Return how many chips do the same: those of one `tensor`, unless it splits the generator."""
    weights = jax.tree.leaves(built.abstract_frozen["base"])
    split = any("tensor" in jax.tree.leaves(tuple(x.sharding.spec)) for x in weights)
    return 1 if split else built.mesh.shape["tensor"]
