"""List what keeps the generator near its pretrained self: each a config entry with a weight.

Those that act on x0 are here, by name. The others act elsewhere: `weight` and `langevin` on the
parameters after an update (train_step.py, optim.py), `gradient` on the rewards' own gradients
(reward_gradient.py).
"""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from r0_jax.method.context import Context
from r0_jax.method.directions import consistency, feature, guidance, output, score

DIRECTIONS: dict[str, Callable[[Context, ConfigDict], jax.Array]] = {
    "output": output,
    "feature": feature,
    "guidance": guidance,
    "consistency": consistency,
    "score": score,
}
ELSEWHERE = ("weight", "langevin", "gradient")
