"""The features that a network sees in image files, for distances between sets of images."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from r0_jax.errors import InputError
from r0_jax.evaluation.feature_network import FeatureNetwork
from r0_jax.evaluation.pairing import Item
from r0_jax.evaluation.scoring import prepared_batches
from r0_jax.weights import lazy


def encode(
    network: FeatureNetwork, items: Sequence[Item], batch_size: int
) -> Float[np.ndarray, "n d"]:
    """Return the features of image files, float32; raise InputError for one it cannot read.

    Each image is brought to the network's size by the network's own preprocessing.
    """
    params = lazy.place(network.params)
    run = jax.jit(lambda params, prepared: network(params, prepared))

    def bad(index: int, message: str) -> None:
        raise InputError(message)

    parts = [
        np.asarray(run(params, drawn[network.prepare]))[: len(indices)]
        for indices, drawn in prepared_batches(
            items, [network.prepare], min(batch_size, len(items)), bad
        )
    ]
    return np.concatenate(parts)
