"""Rewards: images and prompts -> one differentiable score each."""

from collections.abc import Callable

from ml_collections import ConfigDict

from r0_jax.errors import InputError
from r0_jax.rewards import aesthetic, clip_score, plugin
from r0_jax.rewards.reward import Reward

# `type` of a config entry -> how to load it.
TYPES: dict[str, Callable[[str, ConfigDict, str], Reward]] = {
    "clip_score": clip_score.load,
    "aesthetic": aesthetic.load,
    "function": plugin.load,
}
# `type` -> fields without which it is nothing.
_NEEDED = {"clip_score": ("path",), "aesthetic": ("path", "head")}


def load(name: str, entry: ConfigDict, dtype: str = "float32") -> Reward:
    """The reward that one entry of `config.rewards` describes; towers compute in `dtype`."""
    if entry.type not in TYPES:
        raise InputError(f"rewards.{name}.type = {entry.type!r} is unknown; "
                         f"known: {', '.join(TYPES)}")
    for field in _NEEDED.get(entry.type, ()):
        if not entry[field]:
            raise InputError(f"rewards.{name}.{field} is not set: a reward of type {entry.type} "
                             "needs it")
    return TYPES[entry.type](name, entry, dtype)
