"""Many images drawn or scored in batches of one size, so that one compiled program does."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.parallel import heartbeat, sharding
from r0_jax.pipelines.pipeline import Tokens, take

# Of images that are held in float32 while one judge after another looks at them.
CHUNK_BYTES = 2**30


def batch_size(config: ConfigDict, count: int, mesh: Mesh) -> int:
    """Return how many of `count` images are drawn at once, over all devices of `mesh`.

    A device draws config.draw_batch images, by default as many as the training step holds there. A
    batch is not larger than what was asked for, up to what the devices can split.
    """
    parts = sharding.batch_parts(mesh)
    share = max(1, config.batch_size // parts)
    held = min(config.device_batch or share, share)
    return min((config.draw_batch or held) * parts, sharding.divisible(count, mesh))


def chunks(
    count: int, batch_size: int, shape: tuple[int, ...], most_bytes: int = CHUNK_BYTES
) -> Iterator[range]:
    """Yield the rows of `count` images [*shape] in chunks: of whole batches, in `most_bytes`.

    An image has 4 bytes a number. A chunk has one batch at least.
    """
    images = most_bytes // (4 * math.prod(shape))
    size = max(images // batch_size, 1) * batch_size
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def fill(count: int, size: int) -> Int[np.ndarray, " size"]:
    """Return the rows 0, 1, ... of a batch of `size`; past `count` the last one repeats."""
    return np.minimum(np.arange(size), count - 1)


def batches(count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], int]]:
    """Yield the rows of each batch of `size`, the last one filled up, and how many are real."""
    for start in range(0, count, size):
        yield start + fill(count - start, size), min(size, count - start)


def draw(
    sampler: ImageSampler,
    parts: dict[str, Any],
    tokens: Tokens,
    noise: Float[np.ndarray, "n h w c"],
    keys: jax.Array,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "n height width 3"]:
    """Return the images [N, h, w, 3] in [0, 1] of N prompts; call `check` after every batch."""
    drawn = []
    for rows, count in batches(len(noise), batch_size):
        batch = sampler(parts, take(tokens, rows), noise[rows], keys[rows])
        drawn.append(np.asarray(batch)[:count])
        heartbeat.beat("a batch of images")
        check()
    return np.concatenate(drawn)


def score(
    scorer: Callable[..., jax.Array],
    params: Any,
    drawn: Float[np.ndarray, "n h w 3"],
    features: np.ndarray | None,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return what `scorer(params, images, features)` says of every image, [N, ...].

    features: of each image's prompt, [N, D]; None where the scorer reads none. `check` is called
    after every batch.
    """
    found = []
    for rows, count in batches(len(drawn), batch_size):
        batch = None if features is None else features[rows]
        found.append(np.asarray(scorer(params, drawn[rows], batch))[:count])
        heartbeat.beat("a batch of scores")
        check()
    return np.concatenate(found)
