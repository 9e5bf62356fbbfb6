"""Questions to a Qwen2-VL about an image and its prompt, answered with yes or no.

The score is log P(yes) - log P(no) of the answer's first word, averaged over the questions. Unlike
P(yes) it does not saturate, so its gradient does not vanish.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import naming, read_json
from r0_jax.models.qwen2_vl import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from r0_jax.rewards import preprocess
from r0_jax.rewards.around_image import (
    BEFORE,
    END,
    PROMPT,
    AroundImage,
    check_type,
    load_qwen2_vl,
    make_reward,
)
from r0_jax.rewards.reward import Reward
from r0_jax.weights import convert, lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.weights.network import Network, Params, stored_in

# Language -> the answers yes and no, and the questions.
ANSWERS = {"english": ("Yes", "No"), "chinese": ("是", "否")}
QUESTIONS = {
    "english": ('Does this image show "{}"? Please answer yes or no.',),
    "chinese": ("这张图片的内容是否符合“{}”？请回答是或否。",),
}
_AFTER = f"{END}%s<|im_end|>\n<|im_start|>assistant\n"
_HEAD = "lm_head.kernel"
# All that a tokenizer should know; the answers first.
TEXTS = (
    *(word for words in ANSWERS.values() for word in words),
    BEFORE,
    *(_AFTER % question for questions in QUESTIONS.values() for question in questions),
)


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load a transformers folder of Qwen2-VL, of any size; scores are differences of logits.

    The features of a prompt are the token ids of all questions with the prompt in them, int32.
    The tokenizer is read without `text` too: it says what stands before the image. Of the table
    of words only the two answers are read.
    """
    del text
    _check(name, entry)
    folder = remote.local(entry.path)
    with naming(folder):
        with naming(folder / "config.json"):
            config = Qwen2VLConfig.from_json(check_type(folder, "qwen2_vl"))
        files = convert.find_files(folder, "model")
        network = Network.abstract(
            lambda rngs: Qwen2VLForConditionalGeneration(config, words=2, rngs=rngs),
            stored_in(files),
        )
        prepare = preprocess.from_qwen2_vl(
            read_json(folder / "preprocessor_config.json"), entry.size, entry.resize
        )
    tokenizer = load_qwen2_vl(folder, config.vocab_size)
    questions = entry.questions or QUESTIONS[entry.language]
    around = AroundImage(tokenizer, BEFORE, [_AFTER % text for text in questions], entry.tokens)
    answers = _answers(tokenizer, folder, entry.language)
    params = _params(files, config, network, dtype, answers)

    def score(
        params: Params, images: Float[Array, "b h w 3"], features: Int[Array, "b t"]
    ) -> Float[Array, " b"]:
        after = features.reshape(len(features), around.texts, -1)
        logits = network(params, prepare(images).astype(dtype), around.before, after)
        return jnp.mean(logits[..., 0] - logits[..., 1], axis=-1)

    grid = entry.size // config.vision_config.patch_size
    return make_reward(name, params, score, around, grid)


def _check(name: str, entry: ConfigDict) -> None:
    if entry.language not in ANSWERS:
        raise InputError(
            f"rewards.{name}.language = {entry.language!r} is unknown; known: {', '.join(ANSWERS)}"
        )
    for question in entry.questions:
        if PROMPT not in question:
            raise InputError(
                f"rewards.{name}.questions: {question!r} has no {PROMPT}, where the prompt goes"
            )


def _answers(tokenizer, folder: Path, language: str) -> list[int]:
    """Return the ids of yes and no; raise InputError unless each is one token."""
    found = tokenizer(list(ANSWERS[language])).input_ids
    for word, ids in zip(ANSWERS[language], found, strict=True):
        if len(ids) != 1:
            raise InputError(
                f"{folder}: {word!r} is {len(ids)} tokens of this tokenizer, not one: give the "
                "tokenizer of Qwen2-VL"
            )
    return [ids[0] for ids in found]


def _params(
    files: list[Path], config: Qwen2VLConfig, network: Network, dtype: str, answers: Sequence[int]
) -> dict[str, Lazy]:
    """Return the weights in `dtype`, with the answers' columns as the head, in float32."""
    shapes, size = dict(network.shapes), (config.hidden_size, config.vocab_size)
    if tied := config.tie_word_embeddings:
        del shapes[_HEAD]
    else:
        shapes[_HEAD] = jax.ShapeDtypeStruct(size, jnp.float32)
    read = convert.open_params(
        files,
        dataclasses.replace(network, shapes=shapes),
        "float32",
        ("lm_head",) if tied else (),
    )

    def head() -> Float[np.ndarray, "c 2"]:
        if tied:
            table = read["model.embed_tokens.embedding"]
            return np.concatenate([table[i : i + 1, :] for i in answers]).T
        return np.concatenate([read[_HEAD][:, i : i + 1] for i in answers], axis=1)

    params = {k: v.astype(convert.DTYPES[dtype]) for k, v in read.items() if k != _HEAD}
    return params | {_HEAD: lazy.computed((config.hidden_size, 2), np.float32, head)}
