"""The features that a CLIP sees in image files, for distances between sets of images."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from r0_jax.errors import InputError
from r0_jax.evaluation.pairing import Item
from r0_jax.evaluation.scoring import prepared_batches
from r0_jax.rewards.tower import Tower, normalize
from r0_jax.weights import lazy


def encode(found: Tower, items: Sequence[Item], batch_size: int) -> Float[np.ndarray, "n d"]:
    """Return unit-length features of image files, float32; raise InputError for one it cannot read.

    Each image is brought to the tower's size by the tower's own preprocessing.
    """
    params = lazy.place(found.params)

    @jax.jit
    def run(params, prepared):
        return normalize(found.sight.apply(params, "image_features", prepared.astype(found.dtype)))

    def bad(index: int, message: str) -> None:
        raise InputError(message)

    seen = {name: params[name] for name in found.sight.shapes}
    parts = [
        np.asarray(run(seen, drawn[found.prepare]), np.float32)[: len(indices)]
        for indices, drawn in prepared_batches(
            items, [found.prepare], min(batch_size, len(items)), bad
        )
    ]
    return np.concatenate(parts)
