"""Prompts as text: the run's own text encoders and text towers read them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax.typing import DTypeLike
from ml_collections import ConfigDict
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.files import write_bytes
from r0_jax.parallel import distributed
from r0_jax.pipelines.pipeline import Pipeline, Tokens
from r0_jax.prompts import files, prepared
from r0_jax.prompts.columns import PROMPT, read_by
from r0_jax.prompts.order import Draws
from r0_jax.prompts.source import Columns, Evaluation
from r0_jax.rewards.reward import Reward


@dataclasses.dataclass(frozen=True)
class TextPrompts:
    """A `PromptSource` of text.

    Attributes:
      path: file of the training prompts; "" where nothing trains on them.
    """

    path: str = ""
    text: bool = dataclasses.field(default=True, init=False)

    def attach(self, pipeline: Pipeline) -> Pipeline:
        """Return the pipeline itself: it has text encoders."""
        return pipeline

    def check(self, config: ConfigDict) -> None:
        """Do nothing: text encoders make all that a config asks for."""

    def check_guidance(self, needed_by: str) -> None:
        """Do nothing: text encoders encode the empty prompt."""

    def examples(self, reward: Reward, entry: ConfigDict) -> None:
        """Return None: a reward computes its own features."""

    def columns(self, pipeline: Pipeline, rewards: Sequence[Reward]) -> Columns:
        """Return shape and dtype of a row of the token ids and of the rewards' features."""
        tokens = pipeline.tokenize([""])
        found: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            name: (ids.shape[1:], ids.dtype) for name, ids in tokens.items()
        }
        for reward in rewards:
            if reward.text_features is not None:
                width = reward.width or reward.text_features(reward.params, [""]).shape[1]
                found[reward.column] = ((width,), reward.features_dtype)
        return found

    def prepare(
        self,
        folder: Path,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        heldout: Sequence[Reward],
        draws: Draws,
        begun: bool,
    ) -> str:
        """Write token ids and features of the prompts that are drawn, unless they are there."""
        found = prepared.prepare(self.path, folder, pipeline, rewards, heldout, draws, begun)
        told = f"{found.rows} prompts, {found.distinct} of them distinct"
        return told if found.drawn == found.distinct else f"{told}, of which {found.drawn} are used"

    def batches(
        self,
        folder: Path,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        draws: Draws,
        parts: Sequence[int],
        of: int,
    ) -> Iterator[dict[str, NDArray]]:
        """Yield parts of batches of what `prepare` wrote, which was for these rewards."""
        return prepared.batches(folder, draws, parts, of)

    def tokens(self, prompts: Sequence[str], path: str, pipeline: Pipeline) -> Tokens:
        """Return the token ids of prompts."""
        return pipeline.tokenize(prompts)

    def evaluation(
        self,
        path: str,
        count: int,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        kept: Path | None = None,
    ) -> Evaluation:
        """Return the first `count` prompts of a file, tokenized, and the rewards' features."""
        path, fields = path or self.path, read_by(rewards)
        texts = _read(path, fields, count, kept is not None and kept.is_file())
        if kept:
            first = distributed.of_first(lambda: _as_kept(texts, kept, fields))
            if first != texts and path != self.path:  # `prepare` warned of the training prompts
                prepared.warn_of_others(path)
            texts = first
        assert texts is not None
        prompts = texts[PROMPT]
        return Evaluation(prompts, pipeline.tokenize(prompts), prepared.features(texts, rewards))


def _read(
    path: str, fields: Sequence[str], count: int, may_be_gone: bool
) -> dict[str, list[str]] | None:
    try:
        return files.read_texts(path, fields, count)
    except InputError:
        if may_be_gone:
            return None
        raise


def _as_kept(
    texts: dict[str, list[str]] | None, kept: Path, fields: Sequence[str]
) -> dict[str, list[str]]:
    if kept.is_file():
        return files.read_texts(kept, fields)
    assert texts is not None
    rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    plain = rows if fields else texts[PROMPT]
    write_bytes(kept, json.dumps(plain, ensure_ascii=False, indent=1).encode())
    return texts
