"""The pretrained models of a config, read and checked; their weights stay in the files."""

import dataclasses
import itertools
import warnings

from ml_collections import ConfigDict

from r0_jax import rewards
from r0_jax.diffusion import schedulers
from r0_jax.parallel import heartbeat
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts import dataset
from r0_jax.prompts import encoded as encoded_prompts
from r0_jax.prompts.encoded import EncodedPrompts
from r0_jax.rewards import plugin
from r0_jax.rewards.reward import Reward


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """The models that a run starts from.

    Attributes:
      rewards: those that are trained on.
      heldout: those that only measure.
      encoded: prompts that were encoded before; None where the run encodes its own.
    """

    pipeline: Pipeline
    rewards: list[Reward]
    heldout: list[Reward]
    encoded: EncodedPrompts | None


def load(config: ConfigDict) -> Pretrained:
    """Load the models of a config; raise InputError for any that is missing or does not fit."""
    encoded = encoded_prompts.open_of(config)  # then the run needs no text encoder
    pipeline = families.load(config.pretrained, config.dtype, config.family, text=encoded is None)
    heartbeat.beat("the pretrained pipeline's files")
    if encoded is not None:
        pipeline = encoded.attach(pipeline)
        check_encoded(encoded, config)
    if config.test.prompts:  # too many steps for the base would only show after the training
        schedulers.from_folder(pipeline.scheduler_config, config.test.base_steps)
    trained_on = load_rewards(config.rewards, pipeline, config, encoded, trained=True)
    heldout = load_rewards(config.heldout_rewards, pipeline, config, encoded, trained=False)
    _warn_of_heldout_that_is_trained_on(config, trained_on, heldout)
    return Pretrained(pipeline, trained_on, heldout, encoded)


def check_encoded(encoded: EncodedPrompts, config: ConfigDict) -> None:
    """Raise InputError where prompts that were encoded before lack what the config needs.

    `load_rewards` checks the features of the rewards.
    """
    dataset.check_shards(encoded.folder)
    encoded.check_prompts(config.data.prompts)
    for section in (config.eval, config.test):
        if section.prompts:
            encoded.find(section.prompts, section.num_prompts)
    if config.regularizers.guidance.weight:
        encoded.check_guidance("regularizers.guidance")
    if config.test.prompts and config.test.guidance_scale > 1:
        encoded.check_guidance("the base's guidance in test")


def load_rewards(
    entries: ConfigDict,
    pipeline: Pipeline,
    config: ConfigDict,
    encoded: EncodedPrompts | None,
    trained: bool,
) -> list[Reward]:
    """Load the rewards of one section of the config and try each on random images."""
    loaded = []
    for name, entry in entries.items():
        reward, features = rewards.load(name, entry, config.dtype, text=encoded is None), None
        if encoded is not None and reward.text_features is not None:
            encoded.check_reward(reward, entry)
            two = encoded.read(encoded_prompts.TRAIN, [0, encoded.rows[encoded_prompts.TRAIN] - 1])
            features = two[f"features/{name}"]
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
