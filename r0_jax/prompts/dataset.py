"""Prepared prompts: a tfds dataset, and batches of it that depend only on (seed, step)."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo
else:  # tfds takes seconds to import
    DatasetBuilder = DatasetInfo = object

NAME, SPLIT = "prompts", "train"  # of the dataset


class Summary(NamedTuple):
    """The size of a prepared dataset.

    Attributes:
      digest: of all prompts, in order, by `digest`.
    """

    examples: int
    distinct_prompts: int
    digest: str


def digest(prompts: Iterable[str]) -> str:
    """Return 16 characters that differ between different prompts and between different orders."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def prepare(examples: Mapping[str, NDArray | list[str]], folder: str | Path) -> None:
    """Write columns, one of them "prompt", as a tfds dataset in array_record files.

    A list becomes Text. An array [N, ...] becomes Tensor with the shape and dtype of its rows.
    Record i is example i. The folder appears whole or not at all: it is built as `<folder>.tmp`.
    A killed run may leave that one, and the next call replaces it. One process of a run writes.
    """
    import tensorflow_datasets as tfds

    from r0_jax.prompts.builder import PromptsBuilder

    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; delete it to prepare the prompts again")
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it is "downloading"
            builder = PromptsBuilder(examples, data_dir=building, file_format="array_record")
            builder.download_and_prepare()
        os.replace(builder.data_dir, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def is_prepared(folder: str | Path) -> bool:
    """Return whether the folder holds a finished dataset."""
    return (Path(folder) / "dataset_info.json").is_file()


def is_ours(folder: str | Path) -> bool:
    """Return whether `prepare` made the folder."""
    return is_prepared(folder) and open_builder(folder).info.name == NAME


def describe(folder: str | Path) -> Summary:
    """Return the size of a prepared dataset."""
    info = open_builder(folder).info
    return Summary(
        info.splits[SPLIT].num_examples,
        info.metadata["distinct_prompts"],
        info.metadata.get("digest", ""),
    )


def open_info(folder: str | Path) -> DatasetInfo:
    """Return the tfds DatasetInfo of a finished folder; InputError if it cannot be read."""
    return open_builder(folder).info


def check_shards(folder: str | Path) -> None:
    """Raise InputError if a file of any split is missing or cut short.

    Reads the last record of each file: a file that was cut short has lost its index.
    """
    builder = open_builder(folder)
    for name, split in builder.info.splits.items():
        with reading(folder):
            source = builder.as_data_source(split=name)
            for end in itertools.accumulate(split.shard_lengths):
                source[end - 1]


def read(
    folder: str | Path,
    split: str,
    rows: Sequence[int],
    filled: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, NDArray]:
    """Return some rows of a split, {column: array}; text as arrays of str.

    `filled` are columns whose rows differ in length: zeros fill them up to this length.
    """
    with reading(folder):
        return _read(open_builder(folder).as_data_source(split=split), np.asarray(rows), filled)


def load(
    folder: str | Path,
    batch_size: int,
    seed: int,
    step: int = 0,
    parts: Sequence[int] = (0,),
    of: int = 1,
    filled: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[dict[str, NDArray]]:
    """Return this process's rows of the batches `step`, `step + 1`, ..., forever.

    The global batch of `batch_size` rows depends on (seed, step) alone. It falls into `of` equal,
    contiguous parts; this process gets those named in `parts`. An epoch is a permutation of all
    examples. Epochs follow each other without a gap, so one batch may hold the end of an epoch and
    the start of the next. Text columns are arrays of str. `filled` is as for `read`.
    """
    import grain

    if batch_size % of:
        raise InputError(f"batch_size {batch_size} does not divide evenly into {of} parts")
    with reading(folder):
        source = open_builder(folder).as_data_source(split=SPLIT)
        source[0], source[len(source) - 1]  # a missing or cut file fails here, not in a thread
    all_parts = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()  # another order each epoch
        .repeat(2**31)  # forever; grain's own "forever" overflows with batches of one row
        .batch(batch_size // of)
    )

    def read(step: int) -> dict[str, NDArray]:
        # Batch indices, not records: array_record reads a batch at once several times faster.
        rows = np.concatenate([all_parts[step * of + part] for part in parts])
        return _read(source, rows, filled)

    steps = grain.MapDataset.range(step, 2**31).map(read)
    # Threads make batches ahead: a step takes longer than a batch, so few suffice.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(ahead))


@runtime_checkable
class _Source(Protocol):
    """Records with random access."""

    def __getitems__(self, rows: Sequence[int]) -> Sequence[dict]:
        """Return some records: for each column text as bytes, or an array."""


def _read(source: _Source, rows: NDArray, filled: Mapping[str, int]) -> dict[str, NDArray]:
    records = source.__getitems__(rows.tolist())
    columns = {name: [record[name] for record in records] for name in records[0]}
    for name, length in filled.items():
        columns[name] = [_fill_up(value, length) for value in columns[name]]
    return {
        name: np.array([value.decode("utf-8") for value in values])
        if isinstance(values[0], bytes)
        else np.stack(values)
        for name, values in columns.items()
    }


def _fill_up(value: NDArray, length: int) -> NDArray:
    result = np.zeros((length, *value.shape[1:]), value.dtype)
    result[: len(value)] = value
    return result


def open_builder(folder: str | Path) -> DatasetBuilder:
    """Return the tfds builder of a finished folder; InputError if it cannot be read."""
    if not is_prepared(folder):
        raise InputError(f"{folder} is not a prepared dataset: it has no dataset_info.json")
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # protobuf, json or tfds raise it, depending on the broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder} cannot be read ({reason}): is the dataset complete?") from None


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turn what tfds and array_record raise for broken files into an `InputError`."""
    try:
        yield
    except NotImplementedError:
        raise InputError(
            f"{folder} is a tfds dataset without random access; prepare it with "
            "file_format='array_record'"
        ) from None
    except RuntimeError as error:
        raise InputError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from None
