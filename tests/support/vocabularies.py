"""Published files of tokenizers, in miniature: fixtures `bpe` and `vocab`."""

import gzip

import pytest

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdeimoqrstuw",
    "##e",
    "##d",
    "##quare",
    "red",
    "square",
    "##s",
    "红",
    "色",
    "的",
    "方",
    "块",
    "一",
    "个",
    "&",
    ";",
    "#",
    ",",
    "!",
]
MERGES = ["r e", "re d</w>", "s q", "sq u", "squ a", "squa r", "squar e</w>"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """OpenAI's file, with a few merges."""
    path = tmp_path_factory.mktemp("bpe") / "bpe_simple_vocab.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES]).encode()))
    return path


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", "utf-8")
    return path
