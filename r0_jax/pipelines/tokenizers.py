"""Read and check the tokenizers of diffusers folders: CLIP's, BERT's, T5's and Qwen2's."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer

# Class in model_index.json -> (name for people, class of transformers, files that it needs).
_KINDS = {
    "CLIPTokenizer": ("CLIP", "CLIPTokenizer", ("vocab.json", "merges.txt")),
    "BertTokenizer": ("BERT", "BertTokenizer", ("vocab.txt",)),
    "T5Tokenizer": ("T5", "T5TokenizerFast", ("tokenizer.json",)),
    "Qwen2Tokenizer": ("Qwen2", "Qwen2Tokenizer", ("vocab.json", "merges.txt")),
}
# Files of a tokenizer's folder.
FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
KINDS = tuple(f"{kind}{fast}" for kind in _KINDS for fast in ("", "Fast"))


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a transformers tokenizer, which takes seconds to import."""

    model_max_length: int

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Return an object whose `input_ids` are lists of token ids, one a text."""

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token."""


def load_tokenizer(folder: Path, kind: str = "CLIPTokenizer") -> Tokenizer:
    """Return the tokenizer of a folder; InputError if its files are missing or broken."""
    import transformers

    name, cls, needed = _KINDS[kind.removesuffix("Fast")]
    if not (folder / "tokenizer.json").is_file():
        for file in needed:
            if not (folder / file).is_file():
                raise InputError(f"{folder / file} is missing: is the folder complete?")
    check_no_pointers(folder)
    try:
        tokenizer = getattr(transformers, cls).from_pretrained(folder)
        tokenizer(["a"])  # only this fails for an empty vocabulary
        lost, count = _unreachable(tokenizer) if name in ("CLIP", "Qwen2") else (0, 0)
    except Exception as e:  # tokenizers raises bare Exception on malformed files
        raise InputError(f"{folder} does not hold a readable {name} tokenizer ({e})") from None
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length < 2:  # both ends of a prompt
        raise InputError(
            f"{folder}/tokenizer_config.json: model_max_length = {length!r} is not a number of "
            "tokens"
        )
    if lost > 0.01 * count:
        file = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "merges.txt"
        raise InputError(
            f"{folder / file} is incomplete: its merges never make {lost} of {count} "
            "tokens: download it again"
        )
    return tokenizer


def check_no_pointers(folder: Path) -> None:
    """Raise InputError if a file is a Git LFS pointer; a vocab.txt would be read as words."""
    for name in FILES:
        check_not_pointer(folder / name)


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> Int[np.ndarray, "b t"]:
    """Return ids [B, length] int32; a prompt that is cut keeps the end-of-text token."""
    whole = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    cut = sum(len(ids) > length for ids in whole)
    if cut:
        warnings.warn(
            f"{cut} of {len(whole)} prompts ({cut / len(whole):.0%}) are longer than "
            f"{length} tokens and are cut off there",
            stacklevel=3,
        )
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, verbose=False
    ).input_ids
    return np.asarray(ids, np.int32)


def _unreachable(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens of several letters no merge makes, and how many there are.

    A merges.txt cut short at the end of a line is read without an error, but then prompts become
    other tokens.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {"".join(merge) for merge in model["merges"]} | set(tokenizer.all_special_tokens)
    longer = [token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1]
    return sum(token not in made for token in longer), len(longer)
