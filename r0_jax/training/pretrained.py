"""The pretrained models of a config, read and checked; their weights stay in the files."""

import dataclasses
import itertools
import warnings

from ml_collections import ConfigDict

from r0_jax import prompts, rewards
from r0_jax.config import trained_rewards
from r0_jax.diffusion import schedulers
from r0_jax.errors import of_config
from r0_jax.parallel import heartbeat
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.source import PromptSource
from r0_jax.rewards import plugin
from r0_jax.rewards.reward import Reward


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """The models that a run starts from.

    Attributes:
      rewards: those that are trained on.
      heldout: those that only measure.
      prompts: those that the run trains on and measures with.
    """

    pipeline: Pipeline
    rewards: list[Reward]
    heldout: list[Reward]
    prompts: PromptSource


def load(config: ConfigDict) -> Pretrained:
    """Load the models of a config; raise InputError for any that is missing or does not fit."""
    source = prompts.of(config)
    pipeline = families.load(config.pretrained, config.dtype, config.family, text=source.text)
    heartbeat.beat("the pretrained pipeline's files")
    with of_config():
        pipeline = source.attach(pipeline).sized(config.height, config.width)
        source.check(config)
    if config.test.prompts:  # too many steps for the base would only show after the training
        schedulers.from_folder(pipeline.scheduler_config, config.test.base_steps)
    trained_on = load_rewards(trained_rewards(config), pipeline, config, source, trained=True)
    heldout = load_rewards(config.heldout_rewards, pipeline, config, source, trained=False)
    _warn_of_heldout_that_is_trained_on(config, trained_on, heldout)
    return Pretrained(pipeline, trained_on, heldout, source)


def load_rewards(
    entries: ConfigDict | dict[str, ConfigDict],
    pipeline: Pipeline,
    config: ConfigDict,
    source: PromptSource,
    trained: bool,
) -> list[Reward]:
    """Load the rewards of one section of the config; try a user's function on random images."""
    loaded = []
    for name, entry in entries.items():
        reward = rewards.load(name, entry, config.dtype, source.text)
        features = source.examples(reward, entry)
        # Not the library's own, which tests try: at full size that is minutes on a CPU.
        if entry.type == "function":
            plugin.check(reward, pipeline.image_shape, trained, features)
        loaded.append(reward)
        heartbeat.beat(f"the reward {name}'s files")
    return loaded


def _warn_of_heldout_that_is_trained_on(
    config: ConfigDict, trained_on: list[Reward], heldout: list[Reward]
) -> None:
    for reward, other in itertools.product(trained_on, heldout):
        names = (config.rewards[reward.name].function, config.heldout_rewards[other.name].function)
        if reward.same_weights(other) or (names[0] and names[0] == names[1]):
            warnings.warn(
                f"the held-out reward {other.name} is {reward.name} again, "
                "which is trained on: it will not show reward hacking",
                stacklevel=2,
            )
