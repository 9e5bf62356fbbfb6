"""Prompts as embeddings: a tfds dataset of what text encoders made of them, so that training needs
no text encoder. docs/prompts.md describes it, for those who bring their own embeddings.

`r0_jax.encode_prompts` writes it, and so does `encoded_writer.write`, from arrays.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict
from numpy.typing import NDArray

from r0_jax import remote
from r0_jax.config import guided_parts
from r0_jax.errors import InputError
from r0_jax.files import Json, read_json
from r0_jax.pipelines.pipeline import Pipeline, Tokens
from r0_jax.prompts import columns, dataset, files, provenance, shards
from r0_jax.prompts.columns import EMBEDS, PROMPT
from r0_jax.prompts.order import Draws
from r0_jax.prompts.source import Columns, Evaluation
from r0_jax.rewards.reward import Reward

TRAIN, EVALUATION, NEGATIVE = "train", "evaluation", "negative"  # the splits
HELP = "docs/prompts.md says what it should hold"
_AT_ONCE = 64  # prompts read at once
_FLOATS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)))


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """A dataset, opened; a `PromptSource`.

    Attributes:
      rows: of each split.
      schema: shape and dtype of a row of each column but "prompt".
      metadata: what made it, as `provenance.describe` says; {} where nobody wrote it down.
    """

    folder: Path
    rows: dict[str, int]
    schema: dict[str, shards.Kind]
    metadata: Json
    text: bool = dataclasses.field(default=False, init=False)

    def read(self, split: str, rows: Sequence[int]) -> dict[str, NDArray]:
        """Return some rows of a split, {column: array}; "prompt" is an array of str."""
        return _named(dataset.read(self.folder, split, rows, self._filled))

    @property
    def _filled(self) -> dict[str, int]:
        """Return the columns whose rows differ in length, and the longest length."""
        return {EMBEDS: self.schema[EMBEDS][0][0]} if columns.is_ragged(self.schema) else {}

    def attach(self, pipeline: Pipeline) -> Pipeline:
        """Return a pipeline with the embedding that guidance leads away from, if it is here.

        Raises InputError where its network does not take these embeddings, or where its index
        names other text encoders than those that made them.
        """
        folder = pipeline.folder
        for name, wanted in pipeline.embed_shapes.items():
            found = self.schema[name][0] if name in self.schema else None
            if (
                found is None
                or len(found) != len(wanted)
                or any(want not in (None, have) for want, have in zip(wanted, found, strict=True))
            ):
                raise InputError(
                    f"{self.folder} does not fit {folder}: its network takes {name} of shape "
                    f"{_show(wanted)}, there are {_show(found) if found else 'none'} in it; encode "
                    "the prompts with this pipeline, or give the one that they are for"
                )
        here, there = provenance.describe_pipeline(pipeline), self._facts("pipeline")
        for name in sorted(here.keys() & there.keys()):
            if here[name] != there[name]:
                raise InputError(
                    f"{self.folder} was encoded by another pipeline than {folder}: "
                    f"the {name} is {there[name]} there and {here[name]} here"
                )
        if NEGATIVE not in self.rows:
            return pipeline
        negative = self.read(NEGATIVE, [0])
        return dataclasses.replace(
            pipeline, negative={name: negative[name] for name in pipeline.embeds}
        )

    def check(self, config: ConfigDict) -> None:
        """Raise InputError unless the dataset is whole and holds all that a config asks for.

        `examples` and `columns` check the features of the rewards.
        """
        dataset.check_shards(self.folder)
        self.check_prompts(config.data.prompts)
        for section in (config.eval, config.test):
            if section.prompts:
                self.find(section.prompts, section.num_prompts)
        for name in guided_parts(config):
            self.check_guidance(name)
        if config.test.prompts and config.test.guidance_scale > 1:
            self.check_guidance("the base's guidance in test")

    def check_guidance(self, needed_by: str) -> None:
        """Raise InputError if there is no embedding that guidance leads away from."""
        if NEGATIVE not in self.rows:
            raise InputError(
                f"{self.folder} has no split {NEGATIVE!r}, the embedding of the empty "
                f"prompt, which {needed_by} needs; {HELP}"
            )

    def check_features(self, reward: Reward) -> None:
        """Raise InputError if a reward's features are missing or have another width."""
        if reward.text_features is None:
            return
        if reward.column not in self.schema:
            has = ", ".join(columns.rewards_of(self.schema))
            raise InputError(
                f"{self.folder} has no features of the reward {reward.name}, which "
                f"reads prompts (it has those of: {has or 'none'}): encode the "
                "prompts again with this reward in the config"
            )
        shape, _ = self.schema[reward.column]
        if len(shape) != 1 or reward.width not in (None, shape[0]):
            raise InputError(
                f"{self.folder}: {reward.column} has shape {_show(shape)}, but the reward "
                f"{reward.name} takes {_show((reward.width,))}"
            )

    def check_reward(self, reward: Reward, entry: ConfigDict) -> None:
        """Raise InputError if a reward's features are missing or were made by other weights."""
        if reward.text_features is None:
            return
        self.check_features(reward)
        here, there = provenance.describe_reward(reward, entry), self._facts("rewards")
        if there.get(reward.name, here) != here:
            raise InputError(
                f"{self.folder}: the features of {reward.name} were made by a reward "
                "with other weights: encode the prompts again"
            )

    def check_prompts(self, path: str) -> None:
        """Raise InputError unless the training prompts are those of a file; "" accepts any."""
        if not path:
            return
        asked = provenance.describe_prompts(files.stream_prompts(path))
        if self._facts("prompts").get(TRAIN) != asked:
            raise InputError(
                f"the training prompts in {self.folder} are not those of data.prompts="
                f"{path}: encode them again, or take what is there with "
                "--config.data.prompts="
            )

    def examples(self, reward: Reward, entry: ConfigDict) -> NDArray | None:
        """Return a reward's features [2, D] of the first and the last training prompt.

        None where the reward does not read prompts. Raises InputError where the features are
        missing or were made by other weights.
        """
        if reward.text_features is None:
            return None
        self.check_reward(reward, entry)
        return self.read(TRAIN, [0, self.rows[TRAIN] - 1])[reward.column]

    def columns(self, pipeline: Pipeline, rewards: Sequence[Reward]) -> Columns:
        """Return shape and dtype of a row of every column of `batches`."""
        for reward in rewards:
            self.check_features(reward)
        return {
            name: (shape, _dtype_as_read(name, dtype))
            for name in columns.encoded(pipeline, rewards)
            for shape, dtype in [self.schema[name]]
        }

    def prepare(
        self,
        folder: Path,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        heldout: Sequence[Reward],
        draws: Draws,
        begun: bool,
    ) -> str:
        """Return the number of prompts in words: they are prepared."""
        return f"{self.rows[TRAIN]} prompts, encoded before"

    def batches(
        self,
        folder: Path,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        draws: Draws,
        parts: Sequence[int],
        of: int,
    ) -> Iterator[dict[str, NDArray]]:
        """Yield parts of batches of the columns that a pipeline and rewards read."""
        names = columns.encoded(pipeline, rewards)
        for batch in dataset.load(self.folder, draws, parts, of, self._filled):
            named = _named(batch)
            yield {name: named[name] for name in names}

    def tokens(self, prompts: Sequence[str], path: str, pipeline: Pipeline) -> Tokens:
        """Return the embeddings of prompts of a file, found among the evaluation prompts."""
        found = self.read(EVALUATION, self._find(prompts, path))
        return {name: found[name] for name in pipeline.embeds}

    def evaluation(
        self,
        path: str,
        count: int,
        pipeline: Pipeline,
        rewards: Sequence[Reward],
        kept: Path | None = None,
    ) -> Evaluation:
        """Return the first `count` prompts of a file, found among the evaluation prompts.

        They are found by their text; for "" they are the first training prompts. `kept` is not
        needed: the dataset stays what it is.
        """
        found = (
            self.read(EVALUATION, self.find(path, count))
            if path
            else self.read(TRAIN, range(min(count, self.rows[TRAIN])))
        )
        return Evaluation(
            found[PROMPT].tolist(),
            {name: found[name] for name in pipeline.embeds},
            {r.column: found[r.column] for r in rewards if r.text_features is not None},
        )

    def find(self, path: str, count: int) -> list[int]:
        """Return the rows of a file's first `count` prompts among the evaluation prompts.

        Raises InputError for a prompt that is not there.
        """
        return self._find(files.read_prompts(path, count=count), path)

    def _find(self, prompts: Sequence[str], path: str) -> list[int]:
        rows = []
        for prompt in prompts:
            row = self._evaluation_rows.get(prompt)
            if row is None:
                raise InputError(
                    f"{prompt!r} of {path} is not among the evaluation prompts in "
                    f"{self.folder}: encode again with this file in eval.prompts or "
                    "test.prompts, and as many of its prompts"
                )
            rows.append(row)
        return rows

    @functools.cached_property
    def _evaluation_rows(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for start in range(0, self.rows.get(EVALUATION, 0), _AT_ONCE):
            stop = min(start + _AT_ONCE, self.rows[EVALUATION])
            for i, prompt in enumerate(self.read(EVALUATION, range(start, stop))[PROMPT], start):
                rows.setdefault(str(prompt).strip(), i)
        return rows

    def _facts(self, name: str) -> Json:
        found = self.metadata.get(name)
        return found if isinstance(found, dict) else {}


def open_folder(folder: str | Path) -> EncodedPrompts:
    """Open a finished dataset; raise InputError for one that is incomplete, damaged or another."""
    import tensorflow_datasets as tfds

    folder = remote.local(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}, the encoded prompts, is not a folder; {HELP}")
    if not dataset.is_prepared(folder) and any(folder.glob(f"{shards.NAME}-*")):
        raise InputError(
            f"{folder} is not finished: repeat the command that encodes the prompts, "
            "and it continues"
        )
    info = dataset.open_info(folder)
    rows = {name: split.num_examples for name, split in info.splits.items()}
    if not rows.get(TRAIN):
        raise InputError(f"{folder} has no prompts in a split {TRAIN!r}; {HELP}")
    if rows.get(NEGATIVE, 1) != 1:
        raise InputError(f"{folder}: the split {NEGATIVE!r} has {rows[NEGATIVE]} rows, not one")
    features = columns.from_disk(dict(info.features))
    if not isinstance(features.pop(PROMPT, None), tfds.features.Text):
        raise InputError(f"{folder} has no text feature 'prompt'; {HELP}")
    path = folder / "metadata.json"
    metadata = read_json(path) if path.is_file() else {}
    schema: dict[str, shards.Kind] = {}
    for name, feature in features.items():
        shape = getattr(feature, "shape", ())
        if name == EMBEDS and columns.is_ragged(features):
            shape = (_longest(metadata), *shape[1:])
        if type(feature) is not tfds.features.Tensor or None in shape:
            raise InputError(f"{folder}: {name} is not a Tensor of a fixed shape; {HELP}")
        dtype = np.dtype(feature.np_dtype)
        check_dtype(name, dtype)
        schema[name] = (tuple(shape), dtype)
    return EncodedPrompts(folder, rows, schema, metadata)


def _longest(metadata: Json) -> int | None:
    """Return the number of embeddings of the longest prompt, None where nobody wrote it down."""
    match metadata:
        case {"columns": {"prompt_embeds": {"shape": [int(longest), *_]}}}:
            return longest
    return None


def is_float(dtype: DTypeLike) -> bool:
    """Return whether a dtype, bfloat16 too, is of floating-point numbers."""
    return dtype in _FLOATS


def check_dtype(name: str, dtype: DTypeLike) -> None:
    """Raise InputError unless a column may hold this dtype: embeddings are floats."""
    if not is_float(dtype) and (
        name.endswith("prompt_embeds") or not np.issubdtype(dtype, np.integer)
    ):
        raise InputError(f"{name} holds {dtype}, not floating-point numbers; {HELP}")


def _named(found: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Return columns under their own names; features in float32, as rewards take them."""
    return {
        name: value.astype(_dtype_as_read(name, value.dtype), copy=False)
        for name, value in columns.from_disk(found).items()
    }


def _dtype_as_read(name: str, dtype: DTypeLike) -> DTypeLike:
    is_wide = columns.is_features(name) and is_float(dtype)
    return np.dtype(np.float32) if is_wide else dtype


def _show(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
