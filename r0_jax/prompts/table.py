"""Columns of some of many rows, on disk in shards that appear whole or not at all.

A shard is two files of numpy: `rows-N.npy` holds the numbers of its rows, of which N is the first.
`columns-N.npy` holds a record for each, whose fields are the columns.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.files import is_temporary, writing

_OPEN = 64  # shards that are kept open: a process may open only so many files


def write(folder: Path, rows: NDArray, parts: Iterable[Mapping[str, NDArray]]) -> None:
    """Write a shard of some rows, whose columns come in parts, in order."""
    records, start = None, 0
    for part in parts:
        if records is None:
            kinds = [(name, value.dtype, value.shape[1:]) for name, value in part.items()]
            records = np.empty(len(rows), kinds)
        stop = start + len(next(iter(part.values())))
        for name, value in part.items():
            records[name][start:stop] = value
        start = stop
    assert records is not None and start == len(rows)
    # The columns come last: with them the shard is there.
    for name, values in (("rows", rows), ("columns", records)):
        with writing(folder / f"{name}-{rows[0]:010d}.npy") as file:
            np.save(file, values)


def rows_in(folder: Path) -> NDArray:
    """Return the numbers of the rows that are there, in no order."""
    found = [numbers for _, numbers in _shards(folder)]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def clean(folder: Path) -> None:
    """Remove what a killed writer has left."""
    for path in folder.iterdir():
        if is_temporary(path.name):
            path.unlink(missing_ok=True)


def open_array(path: Path) -> NDArray:
    """Map a file of numpy into memory: only what is asked for is read from the disk."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise _damaged(path) from None


class Reader:
    """Reads rows; InputError, at once, if a shard is damaged.

    Args:
      count: rows that there could be, which are numbered from 0.
    """

    def __init__(self, folder: Path, count: int):
        self._paths: list[Path] = []
        self._opened = functools.lru_cache(_OPEN)(open_array)
        # Of each row its shard, or -1, and its place there.
        self._shard, self._place = np.full(count, -1, np.int32), np.empty(count, np.int32)
        for path, numbers in _shards(folder):
            records = open_array(path)
            self._paths.append(path)
            if len(records) != len(numbers) or records.dtype != self._opened(self._paths[0]).dtype:
                raise _damaged(path)
            self._shard[numbers] = len(self._paths) - 1
            self._place[numbers] = np.arange(len(numbers))

    def __call__(self, rows: NDArray) -> dict[str, NDArray]:
        """Return the columns of some rows, which are there."""
        shards, places = self._shard[rows], self._place[rows]
        assert shards.min() >= 0, "a row that was not prepared"
        records = np.empty(len(rows), self._opened(self._paths[0]).dtype)
        for shard in np.unique(shards):
            here = shards == shard
            records[here] = self._opened(self._paths[shard])[places[here]]
        return {name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()}


def _shards(folder: Path) -> Iterator[tuple[Path, NDArray]]:
    """Yield the file of columns and the rows of each shard."""
    for path in sorted(folder.glob("columns-*.npy")):
        yield path, open_array(path.with_name(path.name.replace("columns", "rows")))


def _damaged(path: Path) -> InputError:
    return InputError(
        f"{path} is damaged or not complete: delete this file and those of the same number, and "
        "the next start makes them again"
    )
