"""Read and check the tokenizers of diffusers folders: CLIP's, BERT's, T5's and Qwen2's."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

from r0_jax import machine
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular, read_json

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
    pad_token_id: int

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
    check_files(folder)
    check_added(folder)
    try:
        tokenizer = getattr(transformers, cls).from_pretrained(folder)
        tokenizer(["a"])  # only this fails for an empty vocabulary
        lost, count = _unreachable(tokenizer) if "merges.txt" in needed else (0, 0)
    except Exception as e:  # tokenizers raises bare Exception on malformed files
        raise unreadable(folder, name, e) from None
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"{folder}/tokenizer_config.json names no pad_token that the vocabulary has: give it "
            "the one of the published tokenizer"
        )
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


def unreadable(folder: Path, name: str, error: Exception) -> Exception:
    """Return the error for a folder that transformers cannot read; its own text says little."""
    if machine.problem(error):
        return error
    logging.info("%s: %s: %s", folder, type(error).__name__, error)  # with --verbosity=0
    return InputError(
        f"{folder} does not hold a readable {name} tokenizer: a file of it is damaged or cut "
        "short; download it again"
    )


def check_files(folder: Path) -> None:
    """Raise InputError if a file is a Git LFS pointer, a pipe or a device.

    A vocab.txt that is a pointer would be read as words. transformers opens other files too.
    """
    for name in FILES:
        check_not_pointer(folder / name)
    for path in folder.iterdir() if folder.is_dir() else ():
        check_regular(path)


def check_added(folder: Path) -> None:
    """Raise InputError for added tokens whose ids are far beyond any vocabulary.

    transformers fills the ids up to them with tokens, one by one.
    """
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    for number in found if isinstance(found, dict) else ():
        if not number.isdecimal() or len(number) > 7:
            raise InputError(
                f"{path}: added_tokens_decoder has the id {number[:40]!r}, which no vocabulary has"
            )


class CutOffWarning(UserWarning):
    """Says how many prompts are cut off.

    Attributes:
      rows: which of the prompts.
      length: number of tokens after which they are.
    """

    def __init__(self, rows: Bool[np.ndarray, " n"], length: int):
        self.rows, self.length = rows, length
        super().__init__(
            f"{rows.sum()} of {len(rows)} prompts ({rows.mean():.0%}) are longer than "
            f"{length} tokens and are cut off there"
        )


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], length: int, padding_side: str | None = None
) -> Int[np.ndarray, "b t"]:
    """Return ids [B, length] int32; a prompt that is cut keeps the end-of-text token.

    A textual inversion of several vectors stands for all of them, as in stock pipelines. Pads are
    on the tokenizer's side unless `padding_side` says another.
    """
    prompts = _expanded(tokenizer, prompts)
    whole = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    cut = np.asarray([len(ids) > length for ids in whole])
    if cut.any():
        warnings.warn(CutOffWarning(cut, length), stacklevel=3)
    ids = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        padding_side=padding_side,
        verbose=False,
    ).input_ids
    return np.asarray(ids, np.int32)


def _expanded(tokenizer: Any, prompts: Sequence[str]) -> Sequence[str]:
    """Return the prompts with "<cat> <cat>_1 ..." in place of an added token "<cat>".

    `load_textual_inversion` of diffusers adds a token for each further vector.
    """
    added = getattr(tokenizer, "added_tokens_encoder", {})
    several = {token for token in added if f"{token}_1" in added}
    if not several:
        return prompts
    expanded = []
    for prompt in prompts:
        for token in sorted(several & set(tokenizer.tokenize(prompt))):
            names = [token]
            while f"{token}_{len(names)}" in added:
                names.append(f"{token}_{len(names)}")
            prompt = prompt.replace(token, " ".join(names))
        expanded.append(prompt)
    return expanded


def _unreachable(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens of several letters no merge makes, and how many there are.

    A merges.txt cut short at the end of a line is read without an error, but then prompts become
    other tokens.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {"".join(merge) for merge in model["merges"]} | set(tokenizer.all_special_tokens)
    longer = [token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1]
    return sum(token not in made for token in longer), len(longer)
