"""Rows and batches of a tfds dataset with random access."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from r0_jax import machine
from r0_jax.errors import InputError, disk_problem
from r0_jax.files import check_regular
from r0_jax.prompts import order
from r0_jax.prompts.order import Draws

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo
else:  # tfds takes seconds to import
    DatasetBuilder = DatasetInfo = object

SPLIT = "train"  # which batches are drawn from


def is_prepared(folder: str | Path) -> bool:
    """Return whether the folder holds a finished dataset."""
    return (Path(folder) / "dataset_info.json").is_file()


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
    draws: Draws,
    parts: Sequence[int] = (0,),
    of: int = 1,
    filled: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[dict[str, NDArray]]:
    """Return the batches of `order.batches` of the training split; text as arrays of str.

    `filled` is as for `read`.
    """
    with reading(folder):
        source = open_builder(folder).as_data_source(split=SPLIT)
        source[0], source[len(source) - 1]  # a missing or cut file fails here, not in a thread
    return order.batches(lambda rows: _read(source, rows, filled), len(source), draws, parts, of)


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

    for path in Path(folder).iterdir():
        check_regular(path)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # protobuf, json or tfds raise it, depending on the broken file
        if machine.problem(error):
            raise
        raise InputError(
            f"{folder} cannot be read: is the dataset complete? One of its JSON files is damaged"
        ) from None


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
        if disk_problem(error) or machine.problem(error):
            raise
        raise InputError(
            f"{folder} cannot be read: a file of it is damaged, cut short or missing; make or "
            "download the dataset again"
        ) from None
