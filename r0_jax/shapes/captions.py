"""Captions of scenes in English and Chinese, and the exact way back from caption to scene.

A caption can name two objects in either order, "A left of B" or "B right of A". Both describe
the same canonical scene.
"""

import re
import unicodedata

import numpy as np

from r0_jax.errors import InputError
from r0_jax.shapes.scene import COLOURS, SHAPES, SIZES, Scene, all_scenes, canonical, sample_scenes

LANGUAGES = ("en", "zh")

# Words in the order of SIZES, COLOURS, SHAPES, RELATIONS.
WORDS = {
    "en": {
        "object": "a {size} {colour} {shape}",
        "size": tuple(SIZES),
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "relation": ("to the left of", "to the right of", "above", "below"),
    },
    "zh": {
        "object": "一个{size}的{colour}{shape}",
        "size": ("小", "大"),
        "colour": ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色"),
        "shape": ("圆形", "正方形", "三角形", "十字形"),
        "relation": ("左边", "右边", "上方", "下方"),
    },
}
SINGLE_FRAMES = {
    "en": ("{a}", "a picture of {a}", "there is {a}", "an image showing {a}"),
    "zh": ("{a}", "一张{a}的图片", "图中有{a}", "画面上是{a}"),
}
PAIR_FRAMES = {
    "en": (
        "{a} {relation} {b}",
        "a picture of {a} {relation} {b}",
        "there is {a} {relation} {b}",
        "{a} is {relation} {b}",
    ),
    "zh": (
        "{a}在{b}的{relation}",
        "图中{a}位于{b}的{relation}",
        "{b}的{relation}有{a}",
        "画面上{b}的{relation}是{a}",
    ),
}


def num_templates(language: str, count: int) -> int:
    """Return the number of caption templates for a scene of `count` objects (1 or 2)."""
    # Each frame of a pair serves both orders of the objects.
    return len(SINGLE_FRAMES[language]) if count == 1 else 2 * len(PAIR_FRAMES[language])


def caption(scene: Scene, language: str, template: int) -> str:
    """Return the caption of one scene (fields without a batch axis).

    For a pair, even templates name the objects in the scene's order, odd templates in reverse.
    """
    words = WORDS[language]
    a, b = (
        words["object"].format(
            size=words["size"][scene.size[i]],
            colour=words["colour"][scene.colour[i]],
            shape=words["shape"][scene.shape[i]],
        )
        for i in range(2)
    )
    if scene.count == 1:
        return SINGLE_FRAMES[language][template].format(a=a)
    frame, swapped = divmod(template, 2)
    relation = int(scene.relation)
    if swapped:
        a, b, relation = b, a, relation ^ 1
    return PAIR_FRAMES[language][frame].format(a=a, b=b, relation=words["relation"][relation])


def _patterns(language: str) -> list[re.Pattern]:
    words = WORDS[language]
    one_of = {name: "|".join(words[name]) for name in ("size", "colour", "shape", "relation")}
    a, b = (
        words["object"].format(
            **{k: f"(?P<{k}_{i}>{one_of[k]})" for k in ("size", "colour", "shape")}
        )
        for i in range(2)
    )
    relation = f"(?P<relation>{one_of['relation']})"
    frames = SINGLE_FRAMES[language] + PAIR_FRAMES[language]
    return [re.compile(frame.format(a=a, b=b, relation=relation)) for frame in frames]


_PATTERNS = {language: _patterns(language) for language in LANGUAGES}


def parse(text: str) -> Scene | None:
    """Return the canonical scene that a caption describes, or None if the grammar lacks it.

    Ignore case, spaces, and punctuation at the end.
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip().rstrip(" .,;!?。、")
    spaced = {"en": " ".join(text.split()), "zh": "".join(text.split())}
    for language, patterns in _PATTERNS.items():
        for pattern in patterns:
            if match := pattern.fullmatch(spaced[language]):
                return _scene(match.groupdict(), WORDS[language])
    return None


def _scene(found: dict[str, str], words: dict) -> Scene:
    count = 2 if "relation" in found else 1

    def indices(name: str) -> np.ndarray:
        index = [words[name].index(found[f"{name}_{i}"]) for i in range(count)]
        return np.array(index + [0] * (2 - count), np.int32)

    relation = words["relation"].index(found["relation"]) if count == 2 else 0
    return canonical(
        Scene(
            indices("shape"),
            indices("colour"),
            indices("size"),
            np.array(count, np.int32),
            np.array(relation, np.int32),
        )
    )


def captions_for(scenes: Scene, rng: np.random.Generator, language: str | None = None) -> list[str]:
    """Return one caption per scene, with random templates and, by default, random languages."""
    captions = []
    for fields in zip(*scenes, strict=True):
        scene = Scene(*fields)
        chosen = language or LANGUAGES[rng.integers(len(LANGUAGES))]
        template = int(rng.integers(num_templates(chosen, int(scene.count))))
        captions.append(caption(scene, chosen, template))
    return captions


def prompts(split: str, n: int, seed: int) -> list[str]:
    """Return n distinct captions of a split, alternately English and Chinese.

    Raise InputError if the split has fewer captions.
    """
    rng = np.random.default_rng(seed)
    # This counts pairs only: train has a few more captions, of one object.
    most = len(all_scenes(split).count) * sum(num_templates(lang, 2) for lang in LANGUAGES)
    if n > most:
        raise InputError(f"the {split} split has {most} prompts, not {n}: ask for fewer")
    halves = []
    for language, number in zip(LANGUAGES, (-(-n // 2), n // 2), strict=True):
        distinct: dict[str, None] = {}  # a set that keeps its order
        while len(distinct) < number:
            distinct.update(
                dict.fromkeys(captions_for(sample_scenes(rng, n, split), rng, language))
            )
        halves.append(list(distinct)[:number])
    return [halves[i % 2][i // 2] for i in range(n)]
