"""What a file of prompts holds, without its text: which rows are the same, and a digest of all."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.parallel import heartbeat
from r0_jax.prompts import files
from r0_jax.prompts.files import Row

_AT_ONCE = 2**16  # prompts between two signs of life


@dataclasses.dataclass(frozen=True, eq=False)
class Catalog:
    """The rows of a file of prompts: 20 bytes each.

    Attributes:
      path: of the file.
      keys: uint64 [N, 2]: 16 bytes that stand for the text of a row; other texts have others.
      first: int32 [N]: the first row with the same text.
      fields: names of the texts that a row has besides its prompt.
    """

    path: str | Path
    keys: NDArray
    first: NDArray
    fields: Sequence[str] = ()

    @property
    def digest(self) -> str:
        """Return 16 characters that differ between other prompts and between other orders."""
        return hashlib.sha256(self.keys.tobytes()).hexdigest()[:16]

    def texts(self, rows: NDArray) -> Iterator[Row]:
        """Yield the texts of some rows, which are sorted, by reading the file again.

        Raises InputError if the file is not the one that was read before.
        """
        there, at = files.stream_rows(self.path, self.fields), 0
        for row in rows.tolist():
            texts = next(itertools.islice(there, row - at, None), None)
            if texts is None or _key(texts) != self.keys[row].tobytes():
                raise InputError(f"{self.path} has changed while it was read: start again")
            at = row + 1
            yield texts


def scan(path: str | Path, fields: Sequence[str] = ()) -> Catalog:
    """Read a file of prompts, and `fields` of theirs, once, from its first to its last row."""
    data = bytearray()
    for row, texts in enumerate(files.stream_rows(path, fields)):
        data += _key(texts)
        if row % _AT_ONCE == 0:
            heartbeat.beat(f"prompt {row} of {path}")
    keys = np.frombuffer(data, np.uint64).reshape(-1, 2)
    return Catalog(path, keys, _first_with_the_same(keys), fields)


def count_distinct(first: NDArray) -> int:
    """Return the number of different texts, by `Catalog.first`."""
    return int(np.count_nonzero(first == np.arange(len(first))))


def _key(texts: Row) -> bytes:
    # No text of a file holds a NUL character.
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()


def _first_with_the_same(keys: NDArray) -> NDArray:
    """Return for each row of keys the number of the first row that equals it."""
    order = np.lexsort(keys.T)  # equal keys become neighbours and keep their order
    is_new = np.ones(len(keys), bool)
    is_new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = np.empty(len(keys), np.int32)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first
