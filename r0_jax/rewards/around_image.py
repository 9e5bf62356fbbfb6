"""Text around an image, for networks that read both from left to right.

<|im_start|>system ... <|vision_start|>  IMAGE  <|vision_end|> ... a prompt ... answer:
'------------- before --------------'           '------------- after ---------------'
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from r0_jax.errors import InputError
from r0_jax.files import Json, read_json
from r0_jax.pipelines.tokenizers import load_tokenizer
from r0_jax.rewards.prompt_text import Tokens, check_size, whole
from r0_jax.rewards.reward import Reward
from r0_jax.weights.network import Params

PROMPT = "{}"  # stands in a text where the prompt goes
FILL = -1  # id of what fills up a shorter text
START, END = "<|vision_start|>", "<|vision_end|>"
BEFORE = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{START}"
_SPECIAL = ("<|im_start|>", "<|im_end|>", START, END)


class AroundImage:
    """Token ids of the text before an image, and of texts with a prompt in them after it.

    Attributes:
      before: ids of the text before the image.
      texts: number of texts after it.
      width: ids of all of them together, each filled up to the longest that is possible.
    """

    def __init__(self, tokenizer: Any, before: str, after: Sequence[str], most: int):
        """Take Qwen2-VL's tokenizer and texts in which `PROMPT` stands for the prompt.

        A prompt may lengthen a text by `most` tokens.
        """
        self._tokenizer, self._after = tokenizer, tuple(after)
        self._lengths = [len(self._ids([text], "")[0]) + most for text in self._after]
        self.before: Int[np.ndarray, " s"] = np.asarray(self._ids([before], "")[0], np.int32)
        self.texts, self.width = len(self._after), len(self._after) * max(self._lengths)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Return ids [N, width], filled up with `FILL`; a prompt that is too long loses its end."""
        ids = np.full((len(prompts), self.texts, self.width // self.texts), FILL, np.int32)
        truncated = np.zeros(len(prompts), bool)
        for row, prompt in enumerate(map(whole, prompts)):
            for text, found in enumerate(self._ids(self._after, prompt)):
                if len(found) > self._lengths[text]:
                    truncated[row] = True
                    found = self._cut(text, prompt)
                ids[row, text, : len(found)] = found
        return Tokens(ids.reshape(len(prompts), self.width), truncated)

    def _ids(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
        # As a whole: at their borders the text and the prompt may share a token.
        return self._tokenizer(
            [text.replace(PROMPT, prompt) for text in texts], verbose=False
        ).input_ids

    def _cut(self, text: int, prompt: str) -> list[int]:
        """Return the ids of a text with as many of the prompt's first tokens as fit."""
        ends = [
            end for _, end in self._tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        ]
        kept = len(ends)
        while True:
            [found] = self._ids([self._after[text]], prompt[: ends[kept - 1]] if kept else "")
            over = len(found) - self._lengths[text]
            if over <= 0:
                return found
            kept = max(0, kept - over)


def make_reward(
    name: str,
    params: Params,
    score: Callable[[Params, Array, Array], Float[Array, " b"]],
    around: AroundImage,
    grid: int,
) -> Reward:
    """Return a reward whose features of a prompt are its token ids after the image, int32."""

    def text_features(params: Params, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
        del params
        return around(prompts).ids

    return Reward(
        name,
        params,
        score,
        text_features,
        lambda prompts: around(prompts).truncated,
        grid,
        around.width,
        np.int32,
    )


def load_qwen2_vl(folder: Path, words: int, added: Sequence[str] = ()) -> Any:
    """Return Qwen2-VL's tokenizer, with `added` special tokens behind those that it has.

    Raise InputError for a tokenizer without Qwen2-VL's special tokens, for one that is larger
    than the network's `words` embeddings, and unless added tokens have the last embeddings.
    """
    tokenizer: Any = load_tokenizer(folder, "Qwen2Tokenizer")
    vocabulary = tokenizer.get_vocab()
    for token in _SPECIAL:
        if token not in vocabulary:
            raise InputError(
                f"{folder}: the tokenizer has no {token}: give all files of Qwen2-VL's tokenizer"
            )
    tokenizer.add_tokens(list(added), special_tokens=True)
    check_size(tokenizer, folder, words)
    for token in added:
        if (found := tokenizer.get_vocab()[token]) != words - len(added) + added.index(token):
            raise InputError(
                f"{folder}: {token} is token {found}, but the network's embeddings end at "
                f"{words - 1}: give the tokenizer of Qwen2-VL-7B-Instruct"
            )
    return tokenizer


def check_type(folder: Path, kind: str) -> Json:
    """Return a folder's config; raise InputError if it is not of this `model_type`."""
    path = folder / "config.json"
    fields = read_json(path)
    if (found := fields.get("model_type")) != kind:
        hint = {
            "hps_v3": ": its reward has type hps_v3",
            "qwen2_vl": ": its reward has type vlm_yes_no; r0_jax.convert_reward makes hps_v3",
        }.get(str(found), "")
        raise InputError(f"{path}: model_type = {found!r} is not {kind}{hint}")
    return fields
