"""The prompts of the miniatures, and tokenizers that know their words."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from r0_jax.stand_ins.miniature_files import write_json

PROMPTS = [
    "a red circle",
    "a blue square above a green star",
    "a green star",
    "红色的圆在左边",
    "a star left of a red square",
    "a blue circle",
    "绿色的方",
    "a red star of a circle",
]
TOKENS = 24  # tokens per prompt, for CLIP and BERT
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Qwen2's special tokens, in the order of their ids, and how it splits text into words.
QWEN2_SPECIAL = (
    EOS,
    "<|im_start|>",
    "<|im_end|>",
    *(
        f"<|{part}_{end}|>"
        for part in ("object_ref", "box", "quad", "vision")
        for end in ("start", "end")
    ),
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN2_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What Qwen3's template makes of a prompt, in the template's language.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = sorted({word for prompt in PROMPTS for word in prompt.split() if word.isascii()})
_CHARACTERS = sorted({c for prompt in PROMPTS for c in prompt if not c.isascii()})


def write_tokenizer(
    folder: Path,
    kind: str,
    pad: str,
    length: int = TOKENS,
    words: int = 0,
    texts: Sequence[str] = (),
) -> None:
    """Write a tokenizer that knows the words of `PROMPTS` and reads any text.

    It pads to `length` tokens (T5: 512). The vocabulary of BERT and Qwen2 is filled up to `words`
    entries. Qwen2's also knows most words of `texts`.
    """
    special = {"pad_token": pad, "model_max_length": length, "tokenizer_class": kind}
    if kind == "CLIPTokenizer":
        vocab, merges = _clip_vocabulary()
        write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
        special |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    elif kind == "Qwen2Tokenizer":
        vocab, merges = _qwen2_vocabulary(texts, words)
        write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
        special |= {
            "added_tokens_decoder": {
                str(len(vocab) + i): {"content": token, "special": True}
                for i, token in enumerate(QWEN2_SPECIAL)
            },
            "eos_token": "<|im_end|>",
            "unk_token": None,
            "chat_template": _CHAT,
        }
    elif kind == "BertTokenizer":
        folder.mkdir(parents=True, exist_ok=True)
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS, *_CHARACTERS]
        tokens += [f"[unused{i}]" for i in range(len(tokens), words)]
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
        special |= {
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "do_lower_case": True,
        }
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _t5_tokenizer().save(str(folder / "tokenizer.json"))
        special |= {
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_ids": 0,
            "model_max_length": 512,
        }
    write_json(folder / "tokenizer_config.json", special)


def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" is the first
    merges = _merges([[*word[:-1], word[-1] + "</w>"] for word in _WORDS])
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def _merges(words: Sequence[Sequence[str]]) -> dict[tuple[str, str], None]:
    """Return an ordered set of merges that make these words, each from left to right."""
    return {("".join(word[:i]), word[i]): None for word in words for i in range(1, len(word))}


def _qwen2_vocabulary(
    texts: Sequence[str] = (), words: int = 0
) -> tuple[dict[str, int], list[str]]:
    """Return a byte-level vocabulary that knows words with and without a space before them."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    known = [word for text in texts for word, _ in split.pre_tokenize_str(text)]
    # Those with a space first: the first merges win, and others would split them.
    known = [*(f"Ġ{word}" for word in _WORDS), *known, *_WORDS, "user", "assistant"]
    letters, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), _merges(known)
    tokens = [*letters, *map("".join, merges)]
    # Letters that text never becomes: longer tokens without merges would look like lost merges.
    tokens += [chr(0x10000 + i) for i in range(len(tokens), words - len(QWEN2_SPECIAL))]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def _t5_tokenizer() -> Tokenizer:
    words = [(f"▁{word}", -2.0) for word in _WORDS]
    letters = [(c, -6.0) for c in [*map(chr, range(33, 127)), *_CHARACTERS]]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *words, *letters]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    return tokenizer


def vocabulary_size(kind: str, texts: Sequence[str] = ()) -> int:
    """Return the size of the vocabulary for a text encoder of a class; Qwen2's knows `texts`."""
    if kind == "T5EncoderModel":
        return _t5_tokenizer().get_vocab_size()
    if kind in ("Qwen3Model", "Qwen2VLForConditionalGeneration"):
        return len(_qwen2_vocabulary(texts)[0]) + len(QWEN2_SPECIAL)
    if kind == "BertModel":
        return 5 + len(_WORDS) + len(_CHARACTERS)
    return len(_clip_vocabulary()[0])
