"""The penalties that keep the generator near the base, by the names of their config entries.

`langevin` (optim.py) and `gradient` (reward_gradient.py) are entries of the same section. They act
elsewhere: on the update, and on the rewards' gradient.
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
