"""Captions: the grammar and its parser are exact inverses, prompts are of their split."""

import numpy as np
import pytest

from r0_jax.errors import InputError
from r0_jax.shapes import scene as scene_lib
from r0_jax.shapes.captions import LANGUAGES, caption, captions_for, num_templates, parse, prompts
from r0_jax.shapes.scene import SPLITS, Scene, all_scenes, sample_scenes


def small_red_circle_left_of_large_blue_square() -> Scene:
    numbers = ([0, 1], [0, 2], [0, 1], 2, 0)
    return Scene(*(np.array(field, np.int32) for field in numbers))


def rows(scenes: Scene) -> list[Scene]:
    return [Scene(*fields) for fields in zip(*scenes, strict=True)]


def same(a: Scene, b: Scene) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("language", "template", "text"),
    [
        ("en", 0, "a small red circle to the left of a large blue square"),
        ("en", 1, "a large blue square to the right of a small red circle"),
        ("en", 2, "a picture of a small red circle to the left of a large blue square"),
        ("zh", 0, "一个小的红色圆形在一个大的蓝色正方形的左边"),
        ("zh", 1, "一个大的蓝色正方形在一个小的红色圆形的右边"),
        ("zh", 2, "图中一个小的红色圆形位于一个大的蓝色正方形的左边"),
        ("zh", 4, "一个大的蓝色正方形的左边有一个小的红色圆形"),
    ],
)
def test_captions_read_as_written_and_parse_to_the_scene(language, template, text):
    scene = small_red_circle_left_of_large_blue_square()
    assert caption(scene, language, template) == text
    assert same(parse(text), scene)


def test_one_object_captions():
    numbers = ([2, 0], [3, 0], [1, 0], 1, 0)
    scene = Scene(*(np.array(field, np.int32) for field in numbers))
    assert caption(scene, "en", 0) == "a large yellow triangle"
    assert caption(scene, "zh", 1) == "一张一个大的黄色三角形的图片"
    assert same(parse("there is a large yellow triangle"), scene)


@pytest.mark.parametrize("language", LANGUAGES)
def test_parse_inverts_every_template(language):
    rng = np.random.default_rng(0)
    for scene in rows(sample_scenes(rng, 200, "train")):
        texts = [
            caption(scene, language, template)
            for template in range(num_templates(language, int(scene.count)))
        ]
        assert len(set(texts)) == len(texts)
        assert all(same(parse(text), scene) for text in texts)


def test_no_two_scenes_share_a_caption():
    scenes = rows(all_scenes("test"))
    for language in LANGUAGES:
        texts = {caption(s, language, t) for s in scenes for t in range(num_templates(language, 2))}
        assert len(texts) == len(scenes) * num_templates(language, 2)


@pytest.mark.parametrize(
    "text",
    [
        "  A Small RED circle  to the left\tof a large blue square. ",
        "a small red circle to the left of a large blue square!",
        " 一个小的红色圆形 在一个大的蓝色正方形的左边。",
        "一个小的红色圆形在一个大的蓝色正方形的左边！",
    ],
)
def test_parse_forgives_case_space_and_final_punctuation(text):
    assert same(parse(text), small_red_circle_left_of_large_blue_square())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle",  # no size
        "a small red circle to the left of",
        "a small red circle beside a large blue square",
        "a small pink circle",
        "a small red circle and more",
        "asmallredcircle",
        "a small red circle to the left of a large blue square above a small red circle",
        "一个红色圆形",
        "一个小的红色圆形在一个大的蓝色正方形",
        "a small 红色 circle",
    ],
)
def test_parse_refuses_what_is_outside_the_grammar(text):
    assert parse(text) is None


def test_captions_for_uses_every_template_and_both_languages():
    scenes = sample_scenes(np.random.default_rng(1), 600, "test")
    once = Scene(*(np.repeat(field[:1], 600, 0) for field in scenes))
    assert len(set(captions_for(once, np.random.default_rng(2)))) == 16
    chinese = captions_for(scenes, np.random.default_rng(3), "zh")
    assert all("一个" in text for text in chinese)
    for text, scene in zip(chinese, rows(scenes), strict=True):
        assert same(parse(text), scene)


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_distinct_halves_of_their_split(split):
    texts = prompts(split, 301, seed=0)
    assert len(texts) == 301 == len(set(texts))
    assert [("一个" in text) for text in texts] == [i % 2 == 1 for i in range(301)]
    scenes = Scene(*(np.stack(field) for field in zip(*map(parse, texts), strict=True)))
    assert (scene_lib.split_of(scenes) == SPLITS.index(split)).all()
    assert texts == prompts(split, 301, seed=0)
    assert texts != prompts(split, 301, seed=1)


def test_too_many_prompts_is_one_clear_line():
    with pytest.raises(InputError, match="the validation split has 7040"):
        prompts("validation", 7041, seed=0)
