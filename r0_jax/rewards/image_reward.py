"""ImageReward and CycleReward: a text encoder that attends to the image, and an MLP."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import naming, read_json
from r0_jax.models.blip import CycleReward, ImageReward, ImageRewardConfig
from r0_jax.rewards import prompt_text
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.rewards.reward import Reward, not_loaded
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, stored_in

LENGTH = 35  # tokens in training, start and end included
CYCLE_LENGTH = 128  # the same of CycleReward
SPECIAL = ("[DEC]", "[ENC]")  # BLIP adds these to BERT's vocabulary (`init_tokenizer`)


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load ImageReward from a converted folder; scores are about N(0, 1) on its training set.

    It mirrors ImageReward's `ImageReward.py`.
    """
    return _load(ImageReward, "image_reward", LENGTH, name, entry, dtype, text)


def load_cycle_reward(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load CycleReward from a converted folder; its three checkpoints have one architecture.

    It mirrors `cyclereward/model.py`.
    """
    return _load(CycleReward, "cycle_reward", CYCLE_LENGTH, name, entry, dtype, text)


def _load(
    kind: type[ImageReward],
    model_type: str,
    length: int,
    name: str,
    entry: ConfigDict,
    dtype: str,
    text: bool,
) -> Reward:
    """Load either from a converted folder.

    The features of a prompt are its token ids, int32. Little more can be computed without the
    image: the embeddings and the first self-attention. They are less than 0.2 % of a score's
    arithmetic, but need 768 times the memory per prompt.
    """
    folder = remote.local(entry.path)
    with naming(folder):
        with naming(folder / "config.json"):
            config = ImageRewardConfig.from_json(_config(folder, model_type))
        files = convert.find_files(folder, "model")
        network = Network.abstract(lambda rngs: kind(config, rngs=rngs), stored_in(files))
    params = convert.open_params(files, network, "float32")
    params = {
        k: v if k.startswith("mlp.") else v.astype(convert.DTYPES[dtype]) for k, v in params.items()
    }
    prepare = Preprocess(config.vision_config.image_size, corner="round", resize=entry.resize)

    def judge(
        params: Params, prepared: Float[Array, "b s s 3"], features: Int[Array, "b t"]
    ) -> Float[Array, " b"]:
        return network(params, features, prepared.astype(dtype))

    def score(
        params: Params, images: Float[Array, "b h w 3"], features: Int[Array, "b t"]
    ) -> Float[Array, " b"]:
        return judge(params, prepare(images), features)

    grid = config.vision_config.image_size // config.vision_config.patch_size
    reward = Reward(
        name,
        params,
        score,
        not_loaded(name),
        grid=grid,
        width=length,
        features_dtype=jnp.int32,
        prepare=prepare,
        judge=judge,
    )
    if not text:
        return reward
    tokenize = prompt_text.wordpiece(folder, length, config.text_config.vocab_size, SPECIAL)

    def text_features(params: Params, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
        del params
        return tokenize(prompts).ids

    return dataclasses.replace(
        reward,
        text_features=text_features,
        truncated=lambda prompts: tokenize(prompts).truncated,
    )


def _config(folder: Path, model_type: str) -> dict:
    fields = read_json(folder / "config.json")
    if (found := fields.get("model_type", "image_reward")) != model_type:
        raise InputError(
            f"{folder / 'config.json'}: model_type = {found!r} is not {model_type}: "
            "make the folder with r0_jax.convert_reward"
        )
    return {k: v for k, v in fields.items() if k != "model_type"}
