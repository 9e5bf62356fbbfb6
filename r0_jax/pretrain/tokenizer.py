"""Stage `tokenizer`: builds CLIP's byte-level BPE for the words of both languages."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from r0_jax.pretrain.folders import write_json
from r0_jax.shapes.captions import LANGUAGES, PAIR_FRAMES, SINGLE_FRAMES, WORDS

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
_FIELDS = ("{a}", "{b}", "{relation}", "{size}", "{colour}", "{shape}")


def vocabulary() -> list[str]:
    """Return every word of the grammar, once for each occurrence."""
    words: list[str] = []
    for language in LANGUAGES:
        table = WORDS[language]
        pieces = [*SINGLE_FRAMES[language], *PAIR_FRAMES[language], table["object"]]
        for field in _FIELDS:
            pieces = [piece.replace(field, " ") for piece in pieces]
        pieces += [word for kind in ("size", "colour", "shape", "relation") for word in table[kind]]
        words += [word for piece in pieces for word in piece.split()]
    return words


def build(out: Path, model_max_length: int) -> CLIPTokenizer:
    """Write `out/pipeline/tokenizer` (vocab.json, merges.txt and configs); return the tokenizer."""
    words = vocabulary()
    merges = _spaced_merges([word for word in words if word.isascii()])
    merges += _unspaced_merges([word for word in words if not word.isascii()])
    letters = sorted(ByteLevel.alphabet())
    entries = [
        *letters,
        *(letter + END_OF_WORD for letter in letters),
        *(a + b for a, b in merges),
        BOS,
        EOS,
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}

    folder = out / "pipeline" / "tokenizer"
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        },
    )
    return CLIPTokenizer.from_pretrained(folder)


def _spaced_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn the merges of words that spaces separate."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.train_from_iterator(
        words, BpeTrainer(vocab_size=4096, end_of_word_suffix=END_OF_WORD, show_progress=False)
    )
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def _unspaced_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return the merges of Chinese, which has no spaces: a clause is one long word.

    First merge bytes to characters, then characters to words. Each word occurs inside a clause and
    at its end (with the end-of-word mark).
    """
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    of_characters, of_words = {}, {}
    for word in dict.fromkeys(words):
        characters = [byte_level.pre_tokenize_str(character)[0][0] for character in word]
        for last in (characters[-1:], [characters[-1] + END_OF_WORD]):
            for character in [*characters[:-1], *last]:
                body = character.removesuffix(END_OF_WORD)
                symbols = [*body[:-1], character[len(body) - 1 :]]
                of_characters |= _chain(symbols)
            of_words |= _chain([*characters[:-1], *last])
    return [*of_characters, *of_words]


def _chain(symbols: list[str]) -> dict[tuple[str, str], None]:
    """Return the merges that join the symbols from left to right."""
    return {("".join(symbols[:i]), symbols[i]): None for i in range(1, len(symbols))}
