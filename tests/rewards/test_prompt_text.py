"""Token ids of each type of reward against its reference tokenizer, on prompts that tell tokenizers
apart. (open_clip's: tests/test_convert_reward.py.)"""

import json
import pathlib

import pytest
import tiny
from transformers import BertTokenizer
from vocabularies import WORDS

from r0_jax.rewards import image_reward, prompt_text, tower

DATA = pathlib.Path(__file__).parents[1] / "data"
NASTY = [
    "a red square",
    "",
    "   ",
    "\n\t",
    "200 " + "red " * 200 + "square",
    "squares" * 20,
    "x" * 150,
    "红色的方块，在蓝色圆形上方。",
    "a 红 mixed 色 square",
    "红" * 60,
    "😀 a 👩‍👩‍👧 ☕️ 🥰",
    "😀" * 60,
    "AT&amp;T &lt;b&gt; &amp;quot;red&amp;quot;",
    "<b>&rdquo;red</b>",
    "&#x27;&#39;",
    "“curly” ‘red’ „blue‟",
    "naïve RÉD e\u0301 red\u0301",
    "ＲＥＤ　ｓｑ",
    "ﬁne Ǆ ĳ",
    "[CLS] a [SEP] red",
    "[MASK] [UNK] [PAD]",
    "[DEC] red [ENC]",
    "<|endoftext|> a <|startoftext|>",
    "r\u0000e\u200bd\u00ad",
    "مرحبا ไทย 한국어 カタカナ",
    "!!!???...",
    "$100 50% #tag @user a_b-c/d\\n",
    "don't",
    "½ ² ③",
    "İ ẞ ß ς",
    "𠀀𠀁",
    "a\u3000red\u00a0square",
    "tab\tsep\r\nline\u2028red",
]


def padded(ids, length):
    return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("length", [52, 35])
def test_wordpiece_equals_transformers(vocab, length):
    reference = BertTokenizer.from_pretrained(vocab.parent)
    tokenize = prompt_text.wordpiece(vocab.parent, length, len(WORDS))
    expected = reference(NASTY, padding="max_length", max_length=length, truncation=True)
    assert tokenize(NASTY).ids.tolist() == expected.input_ids


def test_clip_equals_transformers(tmp_path):
    reference = tiny.tokenizer(tmp_path)
    tokenize = prompt_text.clip(tmp_path, tiny.TOKENS, len(reference))
    expected = reference(NASTY, padding="max_length", max_length=tiny.TOKENS, truncation=True)
    assert tokenize(NASTY).ids.tolist() == expected.input_ids


def test_image_reward_has_blips_special_tokens(vocab):
    reference = BertTokenizer.from_pretrained(vocab.parent)  # as BLIP's init_tokenizer makes it
    reference.add_special_tokens({"bos_token": "[DEC]"})
    reference.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
    tokenize = prompt_text.wordpiece(
        vocab.parent, image_reward.LENGTH, len(WORDS) + 2, image_reward.SPECIAL
    )
    found = tokenize(NASTY)
    expected = reference(
        NASTY, padding="max_length", max_length=image_reward.LENGTH, truncation=True
    )
    assert found.ids.tolist() == expected.input_ids
    dec_enc = found.ids[NASTY.index("[DEC] red [ENC]")].tolist()
    assert dec_enc[:5] == [2, len(WORDS), WORDS.index("red"), len(WORDS) + 1, 3]
    assert found.truncated.tolist() == [len(ids) > 35 for ids in reference(NASTY).input_ids]
    assert sum(found.truncated) == 2


def test_chinese_clip_of_its_authors(vocab):
    """Written down from cn_clip 1.6.0's own tokenizer on this vocabulary."""
    rows = json.loads((DATA / "cn_clip_tokens.json").read_text("utf-8"))["rows"]
    assert [row["prompt"] for row in rows] == NASTY
    found = prompt_text.cn_clip(vocab.parent, tower._CHINESE_LENGTH, len(WORDS))(NASTY)
    for row, ids in zip(rows, found.ids.tolist(), strict=True):
        assert ids == padded(row["ids"], 52), row["prompt"]
    other = prompt_text.wordpiece(vocab.parent, 52, len(WORDS))(NASTY)
    assert (other.ids != found.ids).any(axis=1).sum() >= 2  # special tokens, long words


def test_half_of_a_character_is_none(vocab, tmp_path):
    tiny.tokenizer(tmp_path)
    for tokenize in (
        prompt_text.wordpiece(vocab.parent, 8, 99),
        prompt_text.clip(tmp_path, 8, 999),
    ):
        found = tokenize(["red \ud83d", "red \ufffd", "red \ud83d\ude00", "red \U0001f600"]).ids
        assert (found[0] == found[1]).all() and (found[2] == found[3]).all()
