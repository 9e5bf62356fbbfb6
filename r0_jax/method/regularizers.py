"""What keeps the generator on the manifold: penalties, each a config entry with a weight.

`langevin` (in optim.py) and `gradient` (in reward_gradient.py) are entries of the same section
that act elsewhere: on the update, and on the rewards' gradient.
"""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from r0_jax.method.context import Context
from r0_jax.method.penalties import feature, guidance, output, weight

PENALTIES: dict[str, Callable[[Context, ConfigDict], jax.Array]] = {
    "weight": weight,
    "output": output,
    "feature": feature,
    "guidance": guidance,
}
ELSEWHERE = ("langevin", "gradient")
