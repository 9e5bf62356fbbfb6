"""Doubts about the encoding of prompts."""

import warnings

import pytest

from r0_jax.prompts import files

# Common words of which GBK and UTF-8 can both read the bytes, though as other letters.
IN_GBK = ["一只猫", "一位", "原图", "石头", "统一", "状态通知"]
OTHERS = ["\ufffd\ufffd 猫", "锟斤拷烫烫烫"]
FINE = [
    "a photo of a cat, 8k",
    "一只红色的猫，坐在月亮上，α粒子与β射线，Я风格，café风格",
    "東京タワーの夜景 (´Д`) ヽ(´ω`)ノ ʕ•ᴥ•ʔ",
    "한국의 가을 풍경",
    "Ein Mädchen in der Straße, été à Besançon, Øresund, Łódź, İstanbul, Ürümqi, «CAFÉ»",
    "Việt Nam, Pinyin: yī zhī hóngsè de māo, lǜsè",
    "рыжий кот в за\u0301мке, ґудзик, п\u02bcять котів",
    "μια γάτα στο φεγγάρι, Δx = 3 µm, Ω≈ç",
    "կարմիր կատու, կատու։",
    "חָתוּל אָדֹם עַל־הַיָּרֵחַ é־",
    "قطة حمراء، كَلْب، café، گربه\u200cی سرخ",
    "🐱👩‍🚀🇨🇳 1️⃣ ❤️ naïve 中é文",
    "Ελλάδα·Россия, Ελλάδα/Россия",
    "e\u0301te\u0301 z\u0351\u0363a\u0300\u0316lgo",
]


@pytest.mark.parametrize("prompt", IN_GBK)
def test_a_file_in_gbk_that_utf8_can_read_is_doubted(tmp_path, prompt):
    path = tmp_path / "p.txt"
    path.write_bytes(f"a red cat\n{prompt}\n".encode("gbk"))
    said = (
        r"p\.txt: 1 prompt\(s\) look like text of another encoding such as GBK, first in line 2: "
    )
    with pytest.warns(UserWarning, match=said):
        assert len(files.read_prompts(path)) == 2


@pytest.mark.parametrize("prompt", OTHERS)
def test_so_is_what_decoders_leave_behind(tmp_path, prompt):
    (tmp_path / "p.txt").write_text(prompt, "utf-8")
    with pytest.warns(UserWarning, match="1 prompt"):
        files.read_prompts(tmp_path / "p.txt")


def test_no_language_is_doubted(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(FINE), "utf-8")
    assert files.read_prompts(tmp_path / "p.txt") == FINE  # a warning would be an error


def test_it_is_said_when_only_the_first_prompts_are_read(tmp_path):
    (tmp_path / "p.txt").write_text("a\x07b\nc\nd\n", "utf-8")
    with pytest.warns(UserWarning, match=r"left out of 1 prompt\(s\), first in line 1"):
        assert files.read_prompts(tmp_path / "p.txt", count=2) == ["a b", "c"]


def test_a_file_that_is_read_twice_is_told_once(tmp_path):
    (tmp_path / "p.txt").write_text("a\x07b\nc\nd\n", "utf-8")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for count in 1, 2, None:
            files.read_prompts(tmp_path / "p.txt", count=count)
    assert len(told) == 1
