"""Tokenizers of the published models: turn prompts into token ids as in their training."""

import functools
import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from r0_jax.errors import InputError
from r0_jax.pipelines.tokenizers import (
    Tokenizer,
    check_added,
    check_files,
    load_tokenizer,
    unreadable,
)


class Tokens(NamedTuple):
    """Padded token ids, int32, and which prompts were truncated."""

    ids: Int[np.ndarray, "n t"]
    truncated: Bool[np.ndarray, " n"]


Tokenize = Callable[[Sequence[str]], Tokens]


def clip(folder: Path, length: int, vocab_size: int) -> Tokenize:
    """Load transformers' CLIP tokenizer, with the folder's padding; truncation keeps the end token.

    Raise InputError for a vocabulary that is missing, broken, or larger than the `vocab_size`
    embeddings of the network. The other tokenizers here raise it too.
    """
    tokenizer = load_tokenizer(folder)
    check_size(tokenizer, folder, vocab_size)
    return functools.partial(_tokenize, tokenizer, length=length)


def open_clip(folder: Path, length: int, vocab_size: int) -> Tokenize:
    """Load open_clip's `SimpleTokenizer` from the same files: it cleans text first; pads are 0."""
    tokenizer = load_tokenizer(folder)
    check_size(tokenizer, folder, vocab_size)

    def tokenize(prompts: Sequence[str]) -> Tokens:
        # open_clip reads a special token inside a prompt as plain text.
        tokens = _tokenize(
            tokenizer,
            [clean(prompt) for prompt in prompts],
            length=length,
            split_special_tokens=True,
        )
        is_end = tokens.ids == tokenizer.eos_token_id
        is_pad = np.cumsum(is_end, axis=1) - is_end > 0  # after the first end
        return tokens._replace(ids=np.where(is_pad, 0, tokens.ids).astype(np.int32))

    return tokenize


def wordpiece(folder: Path, length: int, vocab_size: int, added: Sequence[str] = ()) -> Tokenize:
    """Load BERT's lower-casing tokenizer from vocab.txt or tokenizer.json; pads are 0.

    `added` are special tokens. If the vocabulary lacks them, they get the next ids. The last
    embeddings are theirs: raise InputError unless the total is `vocab_size`.
    """
    return functools.partial(_tokenize, _bert(folder, vocab_size, added), length=length)


def cn_clip(folder: Path, length: int, vocab_size: int) -> Tokenize:
    """Load cn_clip's `FullTokenizer` from BERT's vocabulary.

    It reads a special token inside a prompt as plain text. It splits words of up to 200 letters;
    BERT splits up to 100. A longer word is the unknown token.
    """
    tokenizer = _bert(folder, vocab_size, ())
    tokenizer.backend_tokenizer.model.max_input_chars_per_word = 200
    return functools.partial(_tokenize, tokenizer, length=length, split_special_tokens=True)


def _bert(folder: Path, vocab_size: int, added: Sequence[str]) -> Any:
    from transformers import BertTokenizer  # seconds

    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise InputError(f"{folder / 'vocab.txt'} is missing: put BERT's vocabulary there")
    check_files(folder)
    check_added(folder)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(added), special_tokens=True)
        tokenizer(["a"])
    except Exception as e:  # tokenizers raises a bare Exception on malformed files
        raise unreadable(folder, "BERT", e) from None
    if tokenizer.pad_token_id != 0:  # the networks mask id 0
        raise InputError(f"{folder} does not hold BERT's vocabulary: [PAD] is not its first token")
    check_size(tokenizer, folder, vocab_size)
    if added and len(tokenizer) != vocab_size:
        raise InputError(
            f"{folder}: the vocabulary has {len(tokenizer)} words with "
            f"{' and '.join(added)}, but the network has {vocab_size} embeddings: give "
            "the vocabulary of bert-base-uncased"
        )
    return tokenizer


def check_size(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Raise InputError if a vocabulary is larger than the network's table of embeddings."""
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(
            f"{folder}: the vocabulary goes up to id {largest}, but the network has "
            f"only {vocab_size} embeddings: it belongs to another model"
        )


def _tokenize(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    length: int,
    **options: bool,
) -> Tokens:
    prompts = [whole(prompt) for prompt in prompts]
    untruncated = tokenizer(prompts, truncation=False, verbose=False, **options).input_ids
    ids = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, verbose=False, **options
    ).input_ids
    return Tokens(np.asarray(ids, np.int32), np.asarray([len(row) > length for row in untruncated]))


def whole(prompt: str) -> str:
    """Join surrogate pairs, which some JSON contains; replace a lone surrogate."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- open_clip's cleaning -----------------------------------------------------------------------

_TERMINAL_ESCAPE = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
_INVISIBLE = dict.fromkeys(
    [
        *range(0x00, 0x09),
        0x0B,
        *range(0x0E, 0x20),
        0x7F,
        *range(0x206A, 0x2070),
        0xFEFF,
        *range(0xFFF9, 0xFFFC),
    ]
)
_LIGATURES = {
    ord(a): b
    for a, b in {
        "Ĳ": "IJ",
        "ĳ": "ij",
        "ŉ": "ʼn",
        "Ǆ": "DŽ",
        "ǅ": "Dž",
        "ǆ": "dž",
        "Ǉ": "LJ",
        "ǈ": "Lj",
        "ǉ": "lj",
        "Ǌ": "NJ",
        "ǋ": "Nj",
        "ǌ": "nj",
        "Ǳ": "DZ",
        "ǲ": "Dz",
        "ǳ": "dz",
        "ﬀ": "ff",
        "ﬁ": "fi",
        "ﬂ": "fl",
        "ﬃ": "ffi",
        "ﬄ": "ffl",
        "ﬅ": "ſt",
        "ﬆ": "st",
    }.items()
}
_WIDTHS = {
    0x3000: " ",
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)},
}
_QUOTES = {**dict.fromkeys(map(ord, "ʼ‘’‚‛"), "'"), **dict.fromkeys(map(ord, "“”„‟"), '"')}
_C1 = {code: bytes([code]).decode("cp1252", "replace") for code in range(0x80, 0xA0)}
_C1 = {code: char for code, char in _C1.items() if char != "\ufffd"}


def clean(prompt: str) -> str:
    """Clean a prompt as open_clip does: repair, unescape, lower-case, and collapse spaces.

    open_clip repairs text with `ftfy.fix_text`. This function repeats its repairs of entities,
    escapes, ligatures, full-width letters, quotes and control characters, and normalizes to NFC.
    It does not repair text that was decoded in the wrong encoding.
    """
    before = None
    unescapes = "<" not in prompt  # beside tags, &lt; may be meant literally
    while prompt != before:
        before = prompt
        if unescapes:
            prompt = html.unescape(prompt)
        prompt = _TERMINAL_ESCAPE.sub("", prompt.translate(_C1))
        prompt = prompt.translate(_LIGATURES).translate(_WIDTHS).translate(_QUOTES)
        prompt = unicodedata.normalize("NFC", whole(prompt).translate(_INVISIBLE))
    prompt = html.unescape(html.unescape(prompt))
    return " ".join(prompt.split()).lower()
