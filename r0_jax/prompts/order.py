"""The order in which a run draws its prompts: it depends only on their number and the seed.

An epoch is a permutation of all rows. Epochs follow each other without a gap, so one batch may hold
the end of an epoch and the start of the next.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.parallel import heartbeat

if TYPE_CHECKING:
    from grain import MapDataset
else:  # grain takes seconds to import
    MapDataset = object

FOREVER = 2**31  # steps, or epochs; grain's own "forever" overflows with batches of one row
_AT_ONCE = 2**14  # draws between two signs of life


class Draws(NamedTuple):
    """The batches of some steps of a run, each of `batch_size` rows."""

    batch_size: int
    seed: int
    steps: range = range(FOREVER)


def batches(
    read: Callable[[NDArray], dict[str, NDArray]],
    rows: int,
    draws: Draws,
    parts: Sequence[int] = (0,),
    of: int = 1,
) -> Iterator[dict[str, NDArray]]:
    """Yield this process's part of each batch, as `read` returns it for numbers of rows.

    A batch falls into `of` equal, contiguous parts; this process gets those named in `parts`.
    Threads read batches ahead, but none after the last one.
    """
    import grain

    if draws.batch_size % of:
        raise InputError(f"batch_size {draws.batch_size} does not divide evenly into {of} parts")
    all_parts = _shuffled(rows, draws.seed).repeat(FOREVER).batch(draws.batch_size // of)

    def read_step(step: int) -> dict[str, NDArray]:
        # Batch indices, not records: array_record reads a batch at once several times faster.
        return read(np.concatenate([all_parts[step * of + part] for part in parts]))

    # Threads make batches ahead: a step takes longer than a batch, so few suffice.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    steps = grain.MapDataset.range(draws.steps.start, draws.steps.stop)
    return iter(steps.map(read_step).to_iter_dataset(ahead))


def rows_of(rows: int, draws: Draws) -> NDArray:
    """Return the numbers of the rows that the batches hold, sorted, each once."""
    start = draws.steps.start * draws.batch_size
    stop = draws.steps.stop * draws.batch_size
    if stop // rows > -(-start // rows):  # a whole epoch
        return np.arange(rows)
    shuffled, drawn = _shuffled(rows, draws.seed), np.zeros(rows, bool)
    for first in range(start, stop, _AT_ONCE):
        drawn[[shuffled[i] for i in range(first, min(first + _AT_ONCE, stop))]] = True
        heartbeat.beat(f"the order of the prompts up to {first}")
    return np.flatnonzero(drawn)


def _shuffled(rows: int, seed: int) -> MapDataset:
    """Return the numbers of rows in another order each epoch; element i + k * `rows` is in k."""
    import grain

    return grain.MapDataset.range(rows).seed(seed).shuffle()
