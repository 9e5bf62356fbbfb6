"""The MLP at the end of the LAION aesthetic predictor and ImageReward: features -> one number."""

import itertools

from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models.attention import Placeholder
from r0_jax.models.linear import Linear

WIDTHS = (1024, 128, 64, 16, 1)


class ScoreMLP(nnx.Module):
    """Apply linear layers with dropout between them and no activation, as published.

    It mirrors the `MLP` of improved-aesthetic-predictor and of ImageReward.
    """

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.config = {"inputs": inputs}
        widths = (inputs, *WIDTHS)
        linears = [Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        self.layers = nnx.List(
            [
                linears[0],
                Placeholder(),
                linears[1],
                Placeholder(),
                linears[2],
                Placeholder(),
                linears[3],
                linears[4],
            ]
        )

    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, " b"]:
        for i in (0, 2, 4, 6, 7):
            features = self.layers[i](features)
        return features[:, 0]
