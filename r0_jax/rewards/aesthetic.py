"""The LAION aesthetic predictor: an MLP on normalized CLIP image features."""

import itertools
from pathlib import Path

import jax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax import convert
from r0_jax.models.attention import Placeholder
from r0_jax.network import Network, Params
from r0_jax.rewards.clip_score import load_tower, normalize
from r0_jax.rewards.reward import Reward

WIDTHS = (1024, 128, 64, 16, 1)


class AestheticMLP(nnx.Module):
    """Linear layers with dropout between them and no activation, as published
    (improved-aesthetic-predictor, `MLP`)."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        self.config = {"inputs": inputs}
        widths = (inputs, *WIDTHS)
        linears = [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        self.layers = nnx.List([linears[0], Placeholder(), linears[1], Placeholder(), linears[2],
                                Placeholder(), linears[3], linears[4]])

    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, " b"]:
        for i in (0, 2, 4, 6, 7):
            features = self.layers[i](features)
        return features[:, 0]


def load(name: str, entry: ConfigDict, dtype: str) -> Reward:
    """A reward from a CLIP folder (`path`) and the head's safetensors file (`head`)."""
    clip, clip_params, _, prepare = load_tower(Path(entry.path), dtype)
    inputs = clip.config.projection_dim
    head = Network.abstract(lambda rngs: AestheticMLP(inputs, rngs=rngs))
    head_params = convert.load([Path(entry.head)], head, "float32")

    def score(params: Params, images: Float[Array, "b h w 3"],
              features: jax.Array | None) -> Float[Array, " b"]:
        del features  # beauty does not ask what was ordered
        image = clip.apply(split(params, "clip/"), "image_features", prepare(images).astype(dtype))
        return head(split(params, "head/"), normalize(image))

    vision = {f"clip/{k}": v for k, v in clip_params.items()}
    return Reward(name, vision | {f"head/{k}": v for k, v in head_params.items()}, score, None)


def split(params: Params, prefix: str) -> Params:
    """The parameters under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
