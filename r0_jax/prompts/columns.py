"""The names of a batch's columns: what a prompt is to the networks and to the rewards.

"prompt" is its text. `Pipeline` names its token ids ("input_ids", ...) and what the text encoders
make of them ("prompt_embeds", ...). `Reward.column` names its features for a reward.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TypeVar

from r0_jax.pipelines.pipeline import LENGTHS, Pipeline
from r0_jax.prompts.files import PROMPT
from r0_jax.rewards.reward import FEATURES, Reward

EMBEDS = "prompt_embeds"
_Value = TypeVar("_Value")


def is_features(name: str) -> bool:
    """Return whether a column holds the features of a reward."""
    return name.startswith(FEATURES)


def is_ragged(names: Container[str]) -> bool:
    """Return whether, of columns, prompts have embeddings of different lengths.

    On disk a row then holds only as many of them as its "prompt_lengths" says.
    """
    return LENGTHS in names


def rewards_of(names: Iterable[str]) -> list[str]:
    """Return the names of the rewards that have features among some columns, sorted."""
    return sorted(name.removeprefix(FEATURES) for name in names if is_features(name))


def read_by(rewards: Iterable[Reward]) -> list[str]:
    """Return the names of the texts, besides the prompt, that rewards read."""
    return sorted({r.reads for r in rewards if r.text_features is not None} - {PROMPT})


def encoded(pipeline: Pipeline, rewards: Sequence[Reward]) -> list[str]:
    """Return the names of the columns that a pipeline and rewards read of encoded prompts."""
    return [*pipeline.embeds, *(r.column for r in rewards if r.text_features is not None)]


def to_disk(columns: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return columns under their names on disk: array_record takes no slash in a name."""
    return {name.replace("/", "__", 1): value for name, value in columns.items()}


def from_disk(columns: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return columns that are named as on disk under their own names."""
    return {name.replace("__", "/", 1): value for name, value in columns.items()}
