"""The base of recipes under the name that it had in 0.1.0, for recipes that import it from here.

It is r0_jax/config.py. Write `from r0_jax import config as common`.
"""

import warnings

from r0_jax.config import get_config, reward_entry

__all__ = ["get_config", "reward_entry"]

warnings.warn(
    "configs.common is an old name: write `from r0_jax import config as common`, and see "
    "docs/method.md for the unit of the regularizers' weights, which is another one since",
    stacklevel=2,
)
