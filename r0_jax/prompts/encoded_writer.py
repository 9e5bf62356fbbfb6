"""Writes encoded prompts: from arrays of your own, or shard by shard as they are computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.pipelines.pipeline import LENGTHS
from r0_jax.prompts import provenance, shards
from r0_jax.prompts.columns import EMBEDS, PROMPT, is_features, is_ragged, to_disk
from r0_jax.prompts.encoded import EVALUATION, HELP, NEGATIVE, TRAIN, check_dtype, is_float
from r0_jax.prompts.shards import Columns, Schema, Shard
from r0_jax.weights.network import fingerprint

DTYPES = ("bfloat16", "float32")  # of embeddings and features on disk
SHARD_PROMPTS = 256  # in a file: so many may be encoded anew after a kill
_AT_ONCE = 64  # prompts written at once

Column = NDArray | jax.Array | Sequence  # of arrays of your own, or of lists
Source = Callable[[Shard], Iterator[Mapping[str, Column]]]  # a shard's columns, in parts


def write(
    folder: str | Path,
    train: Mapping[str, Column],
    evaluation: Mapping[str, Column] | None = None,
    negative: Mapping[str, Column] | None = None,
    dtype: str = "bfloat16",
    shard_prompts: int = SHARD_PROMPTS,
) -> None:
    """Write embeddings of your own as a dataset; called again after a kill, continue.

    Args:
      train: columns of the training prompts: "prompt" (texts), "prompt_embeds" [N, T, D],
        "pooled_prompt_embeds" [N, P] or "prompt_lengths" [N] where the family has them, and
        "features/<reward>" [N, D];
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
        columns = splits[NEGATIVE] = {PROMPT: [""]} | splits[NEGATIVE]
        for name, kind in schema.items():
            if kind is not None and is_features(name):
                columns.setdefault(name, np.zeros((1, *kind[0]), kind[1]))
    for split, columns in splits.items():
        _check_columns(split, columns, schema)

    def source(shard: Shard) -> Iterator[Mapping[str, Column]]:
        for start in range(shard.start, shard.stop, _AT_ONCE):
            stop = min(start + _AT_ONCE, shard.stop)
            yield {name: splits[shard.split][name][start:stop] for name in schema}

    prompts = {
        name: [str(text).strip() for text in columns[PROMPT]] for name, columns in splits.items()
    }
    # A folder that holds other embeddings is not continued.
    known_by = fingerprint(
        {
            f"{split}/{name}": np.asarray(values)
            for split, columns in splits.items()
            for name, values in columns.items()
            if name != PROMPT
        }
    )
    metadata = provenance.describe(
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
    metadata: Mapping[str, object],
    source: Source,
    shard_prompts: int,
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Write this process's share of the shards that are missing.

    Returns whether the dataset is complete; else other processes have yet to write.
    """
    planned = shards.plan(rows, shard_prompts)
    if shards.begin(folder, metadata):
        return True
    on_disk = to_disk(schema)
    for shard in shards.missing(folder, planned[process::processes]):
        parts = (to_disk(_cast(part, schema, shard)) for part in source(shard))
        shards.write(folder, shard, on_disk, parts)
    if shards.missing(folder, planned):
        return False
    shards.finish(folder, planned, on_disk)
    return True


def schema_of(columns: Mapping[str, Column], dtype: str) -> Schema:
    """Return how columns are stored: floats as `dtype`, integers (token ids) as int32."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is unknown; use {' or '.join(map(repr, DTYPES))}")
    if missing := {PROMPT, "prompt_embeds"} - columns.keys():
        raise InputError(f"there is no column {min(missing)!r}; {HELP}")
    schema: Schema = {PROMPT: None}
    for name in sorted(columns.keys() - {PROMPT}):
        if "__" in name or not name.replace("/", "", 1).isidentifier():
            raise InputError(f"{name!r} cannot be the name of a column; {HELP}")
        kind = np.asarray(columns[name][:1]).dtype
        check_dtype(name, kind)
        stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        schema[name] = (
            tuple(np.shape(columns[name])[1:]),
            stored if is_float(kind) else np.dtype(np.int32),
        )
    return schema


def _check_columns(split: str, columns: Mapping[str, Column], schema: Schema) -> None:
    if columns.keys() != schema.keys():
        wrong = min(columns.keys() ^ schema.keys())
        raise InputError(f"{split} and {TRAIN} have different columns: {wrong} is in one only")
    count = 1 if split == NEGATIVE else len(columns[PROMPT])
    if not count:
        raise InputError(f"{split} has no prompts")
    for name, kind in schema.items():
        shape = tuple(np.shape(columns[name]))
        if kind is None and not all(isinstance(text, str) for text in columns[name]):
            raise InputError(f"{split}: prompts should be texts")
        expected = (count, *(kind[0] if kind else ()))
        if shape != expected:
            raise InputError(f"{split}: {name} has shape {list(shape)}; expected {list(expected)}")
    if is_ragged(schema):
        lengths, most = np.asarray(columns[LENGTHS]), np.shape(columns[EMBEDS])[1]
        if lengths.min() < 1 or lengths.max() > most:
            raise InputError(f"{split}: {LENGTHS} should be from 1 to {most}, the rows of {EMBEDS}")


def _cast(columns: Mapping[str, Column], schema: Schema, shard: Shard) -> Columns:
    cast: Columns = {}
    for name, kind in schema.items():
        if kind is None:
            cast[name] = [str(text) for text in columns[name]]
            continue
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            values = np.asarray(columns[name]).astype(kind[1])
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(
                f"{name} of the {shard.split} prompts {shard.start} to "
                f"{shard.stop - 1} has NaN or infinite numbers"
            )
        cast[name] = values
    return cast
