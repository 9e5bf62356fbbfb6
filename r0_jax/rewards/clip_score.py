"""Rewards of CLIP form: agreement of image and prompt in a shared space.

`clip_score`, HPS, PickScore and a world's own preference model are this one function with
different weights: the cosine, or exp(logit_scale) times it.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from r0_jax import convert
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.config import read_json
from r0_jax.network import Network, Params
from r0_jax.pipelines.tokenizers import load_tokenizer, tokenize
from r0_jax.rewards import preprocess
from r0_jax.rewards.reward import Reward

_TEXT_BATCH = 256  # prompts encoded at once; the last batch is padded, to compile once


def load(name: str, entry: ConfigDict, dtype: str) -> Reward:
    """A reward from a transformers folder of a `CLIPModel`."""
    folder = Path(entry.path)
    network, params, tokenizer, prepare = load_tower(folder, dtype)

    def score(params: Params, images: Float[Array, "b h w 3"],
              features: Float[Array, "b d"]) -> Float[Array, " b"]:
        image = network.apply(params, "image_features", prepare(images).astype(dtype))
        cosine = jnp.sum(normalize(image) * normalize(features), axis=-1)
        if entry.logit_scale:
            cosine = cosine * jnp.exp(params["logit_scale"].astype(jnp.float32))
        return cosine

    @jax.jit
    def encode(params: Params, input_ids: jax.Array) -> jax.Array:
        return normalize(network.apply(params, "text_features", input_ids))

    def text_features(params: Params, prompts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Normalized, float32."""
        ids = tokenize(tokenizer, prompts, network.config.text_config.max_position_embeddings)
        rows = []
        for start in range(0, len(ids), _TEXT_BATCH):
            chunk = ids[start:start + _TEXT_BATCH]
            padded = np.pad(chunk, ((0, _TEXT_BATCH - len(chunk)), (0, 0)), mode="edge")
            rows.append(np.asarray(encode(params, padded))[:len(chunk)])
        return np.concatenate(rows)

    return Reward(name, params, score, text_features)


def load_tower(folder: Path, dtype: str
               ) -> tuple[Network, Params, CLIPTokenizer, preprocess.Preprocess]:
    """Both towers of a folder, its tokenizer and its image preprocessing."""
    config = CLIPConfig.from_json(read_json(folder / "config.json"))
    network = Network.abstract(lambda rngs: CLIPModel(config, rngs=rngs))
    params = convert.load(convert.find_files(folder, "model"), network, dtype)
    prepare = preprocess.from_json(read_json(folder / "preprocessor_config.json"),
                                   config.vision_config.image_size)
    return network, params, load_tokenizer(folder), prepare


def normalize(features: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Unit length, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
