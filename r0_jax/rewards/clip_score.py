"""Rewards of CLIP form: agreement of image and prompt in a shared space.

CLIP score, HPS, PickScore, Chinese-CLIP and the embedded world's preference model differ only in
their weights. The score is the cosine, or exp(logit_scale) times it.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.rewards import tower
from r0_jax.rewards.reward import Reward, not_loaded
from r0_jax.rewards.tower import Tower, normalize
from r0_jax.weights.network import Params


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load any CLIP or Chinese-CLIP folder (`tower.load`), with its own preprocessing."""
    return from_tower(name, _tower(entry, dtype, text), entry.logit_scale)


def load_hps(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load HPS v2 or v2.1: the cosine of an image padded to a square (hpsv2 `img_score.py`).

    The two differ only in weights. HPS's tables show 100 times this score.
    """
    return from_tower(name, _tower(entry, dtype, text, policy="pad"), logit_scale=False)


def load_pickscore(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load PickScore v1: exp(logit_scale) times the cosine, 20 to 23 for today's models."""
    return from_tower(name, _tower(entry, dtype, text), logit_scale=True)


def _tower(entry: ConfigDict, dtype: str, text: bool, **preprocess: str) -> Tower:
    """Load the entry's tower; change its preprocessing by the entry's `resize` and `preprocess`."""
    found = tower.load(entry.path, dtype, text)
    return found._replace(
        prepare=dataclasses.replace(found.prepare, resize=entry.resize, **preprocess)
    )


def from_tower(name: str, found: Tower, logit_scale: bool) -> Reward:
    """Make a reward: the cosine of image and prompt in [-1, 1], or exp(logit_scale) times it."""
    sight, prepare = found.sight, found.prepare

    def judge(
        params: Params, prepared: Float[Array, "b s s 3"], features: Float[Array, "b d"]
    ) -> Float[Array, " b"]:
        seen = {key: params[key] for key in sight.shapes}  # without the text tower
        image = sight.apply(seen, "image_features", prepared.astype(found.dtype))
        cosine = jnp.sum(normalize(image) * normalize(features), axis=-1)
        if logit_scale:
            cosine = cosine * jnp.exp(params["logit_scale"])
        return cosine

    def score(
        params: Params, images: Float[Array, "b h w 3"], features: Float[Array, "b d"]
    ) -> Float[Array, " b"]:
        return judge(params, prepare(images), features)

    reward = Reward(
        name,
        found.params,
        score,
        not_loaded(name),
        grid=found.grid,
        width=found.width,
        text_parts=found.text_parts,
        prepare=prepare,
        judge=judge,
    )
    if found.tokenize is None:
        return reward
    return dataclasses.replace(
        reward,
        text_features=found.text_encoder(),
        truncated=lambda prompts: found.tokenize(prompts).truncated,
    )
