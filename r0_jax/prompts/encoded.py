"""Prompts as embeddings: a tfds dataset of what text encoders made of them, so that training needs
no text encoder. docs/prompts.md says what is in it, for who brings embeddings of their own.

`r0_jax.encode_prompts` writes it, and so does `write`, from arrays.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import read_json
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts import dataset, files
from r0_jax.prompts import shards as record_shards
from r0_jax.prompts.shards import Columns, Schema, Shard
from r0_jax.rewards.reward import Reward
from r0_jax.weights.network import fingerprint

TRAIN, EVALUATION, NEGATIVE = "train", "evaluation", "negative"  # the splits
DTYPES = ("bfloat16", "float32")  # of embeddings and features on disk
SHARD_PROMPTS = 256  # in a file: so many may be encoded anew after a kill
_AT_ONCE = 64  # prompts read at once
_FLOATS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)))
_HELP = "docs/prompts.md says what it should hold"

Source = Callable[[Shard], Iterator[Columns]]  # a shard's columns, in parts


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """A dataset, opened.

    Attributes:
      rows: of each split.
      schema: shape and dtype of a row of each column but "prompt".
      metadata: what made it, as `describe_*` below say; {} where nobody wrote it down.
    """

    folder: Path
    rows: dict[str, int]
    schema: dict[str, tuple[tuple[int, ...], np.dtype]]
    metadata: dict[str, Any]

    def read(self, split: str, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Some rows of a split, {column: array}, of which "prompt" is an array of str."""
        return _named(dataset.read(self.folder, split, rows))

    def columns(self, names: Sequence[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of a row of some columns, as `read` and `batches` give them."""
        return {
            name: (shape, _dtype_as_read(name, dtype))
            for name in names
            for shape, dtype in [self.schema[name]]
        }

    def attach(self, pipeline: Pipeline) -> Pipeline:
        """A pipeline that was loaded without text encoders, with the embedding that guidance leads
        away from, if it is there.

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
        here, there = describe_pipeline(pipeline), self._facts("pipeline")
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

    def check_guidance(self, needed_by: str) -> None:
        """InputError if there is no embedding that guidance leads away from."""
        if NEGATIVE not in self.rows:
            raise InputError(
                f"{self.folder} has no split {NEGATIVE!r}, the embedding of the empty "
                f"prompt, which {needed_by} needs; {_HELP}"
            )

    def check_features(self, reward: Reward) -> None:
        """InputError if a reward's features of the prompts are not in it, or of another width."""
        if reward.text_features is None:
            return
        name = f"features/{reward.name}"
        if name not in self.schema:
            has = ", ".join(
                column.removeprefix("features/")
                for column in sorted(self.schema)
                if column.startswith("features/")
            )
            raise InputError(
                f"{self.folder} has no features of the reward {reward.name}, which "
                f"reads prompts (it has those of: {has or 'none'}): encode the "
                "prompts again with this reward in the config"
            )
        shape, _ = self.schema[name]
        if len(shape) != 1 or reward.width not in (None, shape[0]):
            raise InputError(
                f"{self.folder}: {name} has shape {_show(shape)}, but the reward "
                f"{reward.name} takes {_show((reward.width,))}"
            )

    def check_reward(self, reward: Reward, entry: Any) -> None:
        """InputError if a reward's features of the prompts are not in it, or are another's."""
        if reward.text_features is None:
            return
        self.check_features(reward)
        here, there = describe_reward(reward, entry), self._facts("rewards")
        if there.get(reward.name, here) != here:
            raise InputError(
                f"{self.folder}: the features of {reward.name} were made by a reward "
                "with other weights: encode the prompts again"
            )

    def check_prompts(self, path: str) -> None:
        """InputError unless the training prompts are those of a file; "" takes what is there."""
        if path and self._facts("prompts").get(TRAIN) != describe_prompts(files.read_prompts(path)):
            raise InputError(
                f"the training prompts in {self.folder} are not those of data.prompts="
                f"{path}: encode them again, or take what is there with "
                "--config.data.prompts="
            )

    def evaluation(self, path: str, count: int) -> dict[str, np.ndarray]:
        """The columns of a file's first `count` prompts, found by their text among the evaluation
        prompts; of the first training prompts if `path` is ""."""
        if not path:
            return self.read(TRAIN, range(min(count, self.rows[TRAIN])))
        return self.read(EVALUATION, self.find(path, count))

    def find(self, path: str, count: int) -> list[int]:
        """The rows among the evaluation prompts of a file's first `count` prompts; InputError for
        one that is not there."""
        prompts = files.read_prompts(path)[:count]
        rows = [self._evaluation_rows.get(prompt) for prompt in prompts]
        if None in rows:
            lost = prompts[rows.index(None)]
            raise InputError(
                f"{lost!r} of {path} is not among the evaluation prompts in "
                f"{self.folder}: encode again with this file in eval.prompts or "
                "test.prompts, and as many of its prompts"
            )
        return rows

    @functools.cached_property
    def _evaluation_rows(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for start in range(0, self.rows.get(EVALUATION, 0), _AT_ONCE):
            stop = min(start + _AT_ONCE, self.rows[EVALUATION])
            for i, prompt in enumerate(self.read(EVALUATION, range(start, stop))["prompt"], start):
                rows.setdefault(str(prompt).strip(), i)
        return rows

    def _facts(self, name: str) -> dict[str, Any]:
        found = self.metadata.get(name)
        return found if isinstance(found, dict) else {}


def open_folder(folder: str | Path) -> EncodedPrompts:
    """A finished dataset; InputError for another one, or one that is incomplete or damaged."""
    import tensorflow_datasets as tfds

    folder = remote.local(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}, the encoded prompts, is not a folder; {_HELP}")
    if not dataset.is_prepared(folder) and any(folder.glob(f"{record_shards.NAME}-*")):
        raise InputError(
            f"{folder} is not finished: give the command that encodes the prompts "
            "again, and it goes on"
        )
    info = dataset.open_info(folder)
    rows = {name: split.num_examples for name, split in info.splits.items()}
    if not rows.get(TRAIN):
        raise InputError(f"{folder} has no prompts in a split {TRAIN!r}; {_HELP}")
    if rows.get(NEGATIVE, 1) != 1:
        raise InputError(f"{folder}: the split {NEGATIVE!r} has {rows[NEGATIVE]} rows, not one")
    features = dict(info.features)
    if not isinstance(features.pop("prompt", None), tfds.features.Text):
        raise InputError(f"{folder} has no text feature 'prompt'; {_HELP}")
    schema = {}
    for name, feature in features.items():
        if type(feature) is not tfds.features.Tensor or None in feature.shape:
            raise InputError(f"{folder}: {name} is no Tensor of a fixed shape; {_HELP}")
        named, dtype = name.replace("__", "/", 1), np.dtype(feature.np_dtype)
        _check_dtype(named, dtype)
        schema[named] = (tuple(feature.shape), dtype)
    metadata = folder / "metadata.json"
    return EncodedPrompts(folder, rows, schema, read_json(metadata) if metadata.is_file() else {})


def open_of(config: Any) -> EncodedPrompts | None:
    """The dataset that a config names; None where its prompts are text."""
    return open_folder(config.data.encoded) if config.data.encoded else None


def columns_of(pipeline: Pipeline, rewards: Sequence[Reward]) -> list[str]:
    """What a pipeline and rewards read of prompts."""
    return [
        *pipeline.embeds,
        *(f"features/{reward.name}" for reward in rewards if reward.text_features is not None),
    ]


def batches(
    folder: str | Path,
    columns: Sequence[str],
    batch_size: int,
    seed: int,
    step: int,
    parts: Sequence[int],
    of: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Parts of batches of some columns of the training prompts, as of `data.load`."""
    for batch in dataset.load(folder, batch_size, seed, step, parts, of):
        named = _named(batch)
        yield {name: named[name] for name in columns}


# --- writing -------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    train: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    shard_prompts: int = SHARD_PROMPTS,
) -> None:
    """Writes embeddings of your own as a dataset; called again after a kill, it goes on.

    Args:
      train: columns of the training prompts: "prompt" (texts), "prompt_embeds" [N, T, D],
        "pooled_prompt_embeds" [N, P] where the family has them, and "features/<reward>" [N, D];
        floats of any kind, of which np.load(..., mmap_mode="r") reads only what is being written.
      evaluation: the same of prompts that are only looked at.
      negative: the same of the one prompt that guidance leads away from; texts and features are
        not needed.
      dtype: on disk, "bfloat16" or "float32"; integers become int32.
    Raises:
      InputError: columns do not fit together, or hold NaN; or the folder holds something else.
    """
    splits = {
        name: dict(columns)
        for name, columns in ((TRAIN, train), (EVALUATION, evaluation), (NEGATIVE, negative))
        if columns is not None
    }
    schema = schema_of(splits[TRAIN], dtype)
    if NEGATIVE in splits:
        columns = splits[NEGATIVE] = {"prompt": [""]} | splits[NEGATIVE]
        for name, kind in schema.items():
            if name.startswith("features/"):
                columns.setdefault(name, np.zeros((1, *kind[0]), kind[1]))
    for split, columns in splits.items():
        _check_columns(split, columns, schema)

    def source(shard: Shard) -> Iterator[Columns]:
        for start in range(shard.start, shard.stop, _AT_ONCE):
            stop = min(start + _AT_ONCE, shard.stop)
            yield {name: splits[shard.split][name][start:stop] for name in schema}

    prompts = {
        name: [str(text).strip() for text in columns["prompt"]] for name, columns in splits.items()
    }
    # What was written of other embeddings is not gone on with.
    known_by = fingerprint(
        {
            f"{split}/{name}": np.asarray(values)
            for split, columns in splits.items()
            for name, values in columns.items()
            if name != "prompt"
        }
    )
    metadata = describe(
        schema, prompts, {"dtype": dtype, "shard_prompts": shard_prompts, "embeddings": known_by}
    )
    write_shards(
        Path(folder),
        {name: len(texts) for name, texts in prompts.items()},
        schema,
        metadata,
        source,
        shard_prompts,
    )


def write_shards(
    folder: Path,
    rows: Mapping[str, int],
    schema: Schema,
    metadata: Mapping[str, Any],
    source: Source,
    shard_prompts: int,
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Writes this process's share of the shards that are not there yet; whether that completed
    the dataset, else other processes are still to write."""
    shards = record_shards.plan(rows, shard_prompts)
    if record_shards.begin(folder, metadata):
        return True
    on_disk = {_on_disk(name): kind for name, kind in schema.items()}
    for shard in record_shards.missing(folder, shards[process::processes]):
        record_shards.write(
            folder, shard, on_disk, (_cast(part, schema, shard) for part in source(shard))
        )
    if record_shards.missing(folder, shards):
        return False
    record_shards.finish(folder, shards, on_disk)
    return True


def schema_of(columns: Mapping[str, Any], dtype: str) -> Schema:
    """How columns are stored: floats as `dtype`, integers (token ids) as int32."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is unknown; use {' or '.join(map(repr, DTYPES))}")
    if missing := {"prompt", "prompt_embeds"} - columns.keys():
        raise InputError(f"there is no column {min(missing)!r}; {_HELP}")
    schema: Schema = {"prompt": None}
    for name in sorted(columns.keys() - {"prompt"}):
        if "__" in name or not name.replace("/", "", 1).isidentifier():
            raise InputError(f"{name!r} cannot be the name of a column; {_HELP}")
        kind = np.asarray(columns[name][:1]).dtype
        _check_dtype(name, kind)
        stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        schema[name] = (
            tuple(np.shape(columns[name])[1:]),
            stored if kind in _FLOATS else np.dtype(np.int32),
        )
    return schema


def _check_dtype(name: str, dtype: np.dtype) -> None:
    if dtype not in _FLOATS and (
        name.endswith("prompt_embeds") or not np.issubdtype(dtype, np.integer)
    ):
        raise InputError(f"{name} holds {dtype}, not floating-point numbers; {_HELP}")


def _check_columns(split: str, columns: Mapping[str, Any], schema: Schema) -> None:
    if columns.keys() != schema.keys():
        wrong = min(columns.keys() ^ schema.keys())
        raise InputError(f"{split} and {TRAIN} have different columns: {wrong} is in one only")
    count = 1 if split == NEGATIVE else len(columns["prompt"])
    if not count:
        raise InputError(f"{split} has no prompts")
    for name, kind in schema.items():
        shape = tuple(np.shape(columns[name]))
        if name == "prompt":
            if not all(isinstance(text, str) for text in columns[name]):
                raise InputError(f"{split}: prompts should be texts")
            kind = ((), None)
        if shape != (count, *kind[0]):
            raise InputError(
                f"{split}: {name} has shape {list(shape)}; expected {[count, *kind[0]]}"
            )


def _cast(columns: Columns, schema: Schema, shard: Shard) -> Columns:
    cast: Columns = {}
    for name, kind in schema.items():
        if kind is None:
            cast[_on_disk(name)] = [str(text) for text in columns[name]]
            continue
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            values = np.asarray(columns[name]).astype(kind[1])
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(
                f"{name} of the {shard.split} prompts {shard.start} to "
                f"{shard.stop - 1} has NaN or infinite numbers"
            )
        cast[_on_disk(name)] = values
    return cast


# --- what made it --------------------------------------------------------------------------------


def describe(
    schema: Schema, prompts: Mapping[str, Sequence[str]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The dataset's metadata.json: its columns, its prompts by their digest, and more facts."""
    columns = {
        name: {"shape": list(kind[0]), "dtype": kind[1].name}
        for name, kind in schema.items()
        if kind
    }
    return {
        **facts,
        "columns": columns,
        "prompts": {split: describe_prompts(texts) for split, texts in prompts.items()},
    }


def describe_prompts(prompts: Sequence[str]) -> dict[str, Any]:
    """How many, how many different ones, and a digest of all in order."""
    digest = hashlib.sha256("\0".join(prompts).encode("utf-8")).hexdigest()
    return {"rows": len(prompts), "distinct": len(set(prompts)), "sha256": digest}


def describe_pipeline(pipeline: Pipeline) -> dict[str, str]:
    """Its family and the classes of its text encoders, by what model_index.json says, so that it
    can be compared where they are gone."""
    index = read_json(pipeline.folder / "model_index.json")
    entries = {
        name: entry[-1]
        for name, entry in index.items()
        if name.startswith("text_encoder") and isinstance(entry, list) and entry
    }
    return {"family": index["_class_name"], **{k: v for k, v in entries.items() if v}}


def describe_reward(reward: Reward, entry: Any) -> dict[str, str]:
    """By which a reward is known again: its weights, or the user's own function."""
    return {"weights": reward.fingerprint(), "function": entry.function}


# --- names ---------------------------------------------------------------------------------------


def _on_disk(name: str) -> str:
    return name.replace("/", "__", 1)  # array_record takes no slash in a column's name


def _named(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns under their names; features in float32, as rewards take them."""
    named = {name.replace("__", "/", 1): value for name, value in columns.items()}
    return {
        name: value.astype(_dtype_as_read(name, value.dtype), copy=False)
        for name, value in named.items()
    }


def _dtype_as_read(name: str, dtype: np.dtype) -> np.dtype:
    is_wide = name.startswith("features/") and dtype in _FLOATS
    return np.dtype(np.float32) if is_wide else dtype


def _show(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
