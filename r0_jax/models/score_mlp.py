"""The MLP at the end of the LAION aesthetic predictor, ImageReward and CycleReward."""

import itertools

from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import Placeholder
from r0_jax.models.linear import Linear

WIDTHS = (1024, 128, 64, 16, 1)


class ScoreMLP(nnx.Module):
    """Make one number of features by linear layers; between them is dropout, or an activation.

    It mirrors the `MLP` of improved-aesthetic-predictor and of ImageReward, without an activation
    and with no dropout before the last layer, and that of cyclereward, with "gelu".
    """

    def __init__(self, inputs: int, *, activation: str | None = None, rngs: nnx.Rngs):
        self.config = {"inputs": inputs}
        self.activation = activation
        widths = (inputs, *WIDTHS)
        linears = [Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        layers = [part for linear in linears for part in (linear, Placeholder())][:-1]
        if activation is None:
            del layers[-2]
        self.layers = nnx.List(layers)

    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, " b"]:
        linears = [layer for layer in self.layers if isinstance(layer, Linear)]
        for linear in linears[:-1]:
            features = linear(features)
            if self.activation is not None:
                features = ACTIVATIONS[self.activation](features)
        return linears[-1](features)[:, 0]
