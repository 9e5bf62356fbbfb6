"""The LAION aesthetic predictor: an MLP on normalized CLIP image features."""

import dataclasses

import jax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.rewards import tower
from r0_jax.rewards.reward import Reward
from r0_jax.rewards.tower import normalize
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params

HEAD = "aesthetic_head.safetensors"


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load the aesthetic reward from the CLIP folder `path` and the safetensors file `head`.

    The default of `head` is aesthetic_head.safetensors in that folder. Scores are about 1 to 10.
    """
    del text  # the prompt is not read
    found = tower.load(entry.path, dtype, text=False)
    # The predictor uses OpenAI's preprocessing, whichever library wrote the folder.
    prepare = dataclasses.replace(found.prepare, corner="round", resize=entry.resize)
    clip = found.sight
    head = Network.abstract(lambda rngs: ScoreMLP(found.width, rngs=rngs))
    path = remote.local(entry.head or entry.path)
    path = path if entry.head else path / HEAD
    head_params = convert.open_params([path], head, "float32")

    def judge(
        params: Params, prepared: Float[Array, "b s s 3"], features: jax.Array | None
    ) -> Float[Array, " b"]:
        del features  # the prompt plays no part
        image = clip.apply(split(params, "clip/"), "image_features", prepared.astype(dtype))
        return head(split(params, "head/"), normalize(image))

    def score(
        params: Params, images: Float[Array, "b h w 3"], features: jax.Array | None
    ) -> Float[Array, " b"]:
        return judge(params, prepare(images), features)

    vision = {f"clip/{k}": v for k, v in found.params.items()}
    return Reward(
        name,
        vision | {f"head/{k}": v for k, v in head_params.items()},
        score,
        None,
        grid=found.grid,
        prepare=prepare,
        judge=judge,
    )


def split(params: Params, prefix: str) -> Params:
    """Return the parameters under `prefix`, with the prefix removed from their names."""
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
