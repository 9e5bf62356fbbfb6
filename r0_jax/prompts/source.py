"""Where a run's prompts come from: text, or embeddings that were made before.

Everything that depends on which of the two it is stands in `TextPrompts` and `EncodedPrompts`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from jax.typing import DTypeLike
from ml_collections import ConfigDict
from numpy.typing import NDArray

from r0_jax.pipelines.pipeline import Pipeline, Tokens
from r0_jax.prompts.order import Draws
from r0_jax.rewards.reward import Reward

Columns = Mapping[str, tuple[tuple[int, ...], DTypeLike]]  # name -> shape of a row, dtype


class Evaluation(NamedTuple):
    """Prompts to measure with.

    Attributes:
      tokens: what `Pipeline.encode_prompt` takes of them.
      features: {`Reward.column`: [N, D]} of the rewards that read prompts.
    """

    prompts: list[str]
    tokens: Tokens
    features: dict[str, NDArray]


@runtime_checkable
class PromptSource(Protocol):
    """Prompts of one kind, text or encoded."""

    @property
    def text(self) -> bool:
        """Return whether text encoders and the text towers of rewards are needed."""

    def attach(self, pipeline: Pipeline) -> Pipeline:
        """Return a pipeline, loaded with or without `text`, that is complete for these prompts.

        Raises InputError where the prompts are not for this pipeline.
        """

    def check(self, config: ConfigDict) -> None:
        """Raise InputError unless the prompts are whole and hold all that a config asks for."""

    def check_guidance(self, needed_by: str) -> None:
        """Raise InputError where guidance has no empty prompt to lead away from."""

    def examples(self, reward: Reward, entry: ConfigDict) -> NDArray | None:
        """Return a reward's features [2, D] of two prompts; None where it computes its own.

        Raises InputError where there are none of this reward, of `entry` in the config.
        """

    def columns(self, pipeline: Pipeline, rewards: Sequence[Reward]) -> Columns:
        """Return shape and dtype of a row of every column of `batches`."""

    def prepare(
        self,
        folder: Path,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        heldout: Sequence[Reward],
        draws: Draws,
        begun: bool,
    ) -> str:
        """Make ready what `batches` of `draws` read; return the number of prompts in words.

        It is in `folder`, where a run that has `begun` keeps its prompts. One process calls it for
        all.
        """

    def batches(
        self,
        folder: Path,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        draws: Draws,
        parts: Sequence[int],
        of: int,
    ) -> Iterator[dict[str, NDArray]]:
        """Yield parts of the batches of `draws`, as `order.batches` does."""

    def tokens(self, prompts: Sequence[str], path: str, pipeline: Pipeline) -> Tokens:
        """Return what `Pipeline.encode_prompt` takes of some prompts, which are of the file `path`.

        Raises InputError for a prompt that is not there.
        """

    def evaluation(
        self,
        path: str,
        count: int,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        kept: Path | None = None,
    ) -> Evaluation:
        """Return the first `count` prompts of a file, or of the training prompts for "".

        A run's first start writes the prompts to the file `kept`, and all others read them from
        there: a run measures the same prompts to its end. All processes call it together.
        """
