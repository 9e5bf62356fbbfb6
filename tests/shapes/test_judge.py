"""The judge: right on clean scenes, calm under mild damage, strict about everything said."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from r0_jax.errors import InputError
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.judge import judge, see
from r0_jax.shapes.scene import (
    COLOURS,
    SPLITS,
    Layout,
    Scene,
    render,
    sample_layouts,
    sample_scenes,
)

N = 160


def draw(split: str, n: int, seed: int = 0) -> tuple[Scene, Layout, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, n, split)
    layouts = sample_layouts(rng, scenes)
    return scenes, layouts, render(scenes, layouts), captions_for(scenes, rng)


@pytest.fixture(scope="module")
def drawn() -> tuple[Scene, Layout, np.ndarray, list[str]]:
    return draw("train", N)


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0))


def noise(images: np.ndarray, std: float) -> np.ndarray:
    noisy = images + np.random.default_rng(1).normal(0, std, images.shape)
    return noisy.clip(0, 1).astype(np.float32)


def jpeg(images: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    def once(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        pixels = (image * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(file, "jpeg", quality=quality, subsampling=subsampling)
        return np.asarray(Image.open(file), np.float32) / 255

    return np.stack([once(image) for image in images])


def tint(images: np.ndarray) -> np.ndarray:
    """Each image's colours shifted a little, as by an autoencoder."""
    shift = np.random.default_rng(2).normal(0, 0.05, (len(images), 1, 1, 3))
    return (images + shift).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("split", SPLITS)
def test_every_clean_scene_is_correct(split):
    _, _, images, captions = draw(split, 2000, seed=3)
    verdict = judge(images, captions)
    for field in verdict:
        assert field.dtype == bool and field.shape == (2000,) and field.all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda images: blur(images, 0.7),
        lambda images: noise(images, 0.03),
        lambda images: noise(blur(images, 0.7), 0.03),
        lambda images: jpeg(images, 75, subsampling=0),
        lambda images: jpeg(images, 90, subsampling=2),
        tint,
    ],
    ids=["blur", "noise", "blur and noise", "jpeg", "jpeg with half the colour", "tint"],
)
def test_mild_damage_changes_nothing(drawn, damage):
    _, _, images, captions = drawn
    assert judge(damage(images), captions).correct.mean() >= 0.98


@pytest.mark.parametrize(("attribute", "number"), [("shape", 4), ("colour", 6), ("size", 2)])
def test_one_wrong_attribute_is_seen_and_named(drawn, attribute, number):
    scenes, _, images, _ = drawn
    rng = np.random.default_rng(4)
    wrong = getattr(scenes, attribute).copy()
    row, which = np.arange(N), np.where(scenes.count == 2, rng.integers(2, size=N), 0)
    wrong[row, which] = (wrong[row, which] + rng.integers(1, number, size=N)) % number
    verdict = judge(images, captions_for(scenes._replace(**{attribute: wrong}), rng))
    assert not verdict.correct.any() and verdict.presence.all()
    assert getattr(verdict, attribute).mean() <= 0.01
    for other in {"shape", "colour", "size"} - {attribute}:
        assert getattr(verdict, other).mean() >= 0.99


@pytest.mark.parametrize("change", [1, 2, 3], ids=["inverse", "turned", "turned inverse"])
def test_wrong_relation_is_seen_and_named(drawn, change):
    scenes, _, images, _ = drawn
    other = scenes._replace(relation=scenes.relation ^ change)
    verdict = judge(images, captions_for(other, np.random.default_rng(5)))
    pair = scenes.count == 2
    assert not verdict.relation[pair].any() and not verdict.correct[pair].any()
    assert verdict.colour.all() and verdict.shape.all() and verdict.size.all()
    assert verdict.correct[~pair].all()  # one object has no relation


def test_wrong_count_fails_all_attributes(drawn):
    scenes, _, images, _ = drawn
    other = scenes._replace(count=3 - scenes.count)
    verdict = judge(images, captions_for(other, np.random.default_rng(6)))
    assert not np.stack(verdict).any()


def test_attributes_must_hold_of_the_right_objects():
    """The right colours, shapes and sizes on the wrong objects are wrong."""
    scenes, _, images, _ = draw("test", N, seed=7)
    for attribute in ("shape", "colour", "size"):
        field = getattr(scenes, attribute)
        differs = field[:, 0] != field[:, 1]
        # where the objects are alike otherwise, this is the inverse relation: as wrong
        other = scenes._replace(**{attribute: field[:, ::-1]})
        correct = judge(images, captions_for(other, np.random.default_rng(8))).correct
        assert not correct[differs].any() and correct[~differs].all() and differs.sum() > N / 4


def test_an_extra_object_is_rejected():
    scenes, layouts, images, captions = draw("train", 100, seed=9)
    # a small disc wherever there is most room, of a palette colour or black
    y, x = np.mgrid[:64, :64] + 0.5
    grid = np.stack(np.meshgrid(np.arange(6, 60, 4), np.arange(6, 60, 4)), -1).reshape(-1, 2)
    away = np.linalg.norm(grid[None, :, None] - layouts.centre[:, None], axis=-1)
    room = np.where(np.arange(2) < scenes.count[:, None, None], away - layouts.radius[:, None], 99)
    at = grid[room.min(-1).argmax(-1)]
    disc = np.hypot(x - at[:, 0, None, None], y - at[:, 1, None, None]) < 4.0
    for colour in [*COLOURS.values(), (0.0, 0.0, 0.0)]:
        extra = np.where(disc[..., None], np.float32(colour), images).astype(np.float32)
        verdict = judge(extra, captions)
        assert verdict.presence.mean() <= 0.01 and verdict.correct.mean() <= 0.01


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((20, 64, 64, 3)),
        np.full((20, 64, 64, 3), 0.5),
        np.ones((20, 64, 64, 3)),
        np.full((20, 64, 64, 3), np.nan),
        np.broadcast_to(np.array(COLOURS["red"]), (20, 64, 64, 3)),
        np.random.default_rng(0).random((20, 64, 64, 3)),
        blur(np.random.default_rng(0).normal(0.5, 2.0, (20, 64, 64, 3)), 3.0).clip(0, 1),
    ],
    ids=["black", "grey", "white", "nan", "red", "noise", "smooth noise"],
)
def test_images_of_nothing_are_rejected(drawn, images):
    assert not judge(images.astype(np.float32), drawn[3][:20]).correct.any()


def halved(scenes: Scene, layouts: Layout, side: int) -> np.ndarray:
    """Images of the scenes where one half of object 0 was not drawn."""
    images = render(scenes, layouts)
    empty = render(scenes._replace(count=np.zeros_like(scenes.count)), layouts)
    pixel = np.arange(64) + 0.5
    centre = layouts.centre[:, 0]
    cut = {
        0: (pixel < centre[:, :1])[:, None, :, None],
        1: (pixel > centre[:, :1])[:, None, :, None],
        2: (pixel < centre[:, 1:])[:, :, None, None],
        3: (pixel > centre[:, 1:])[:, :, None, None],
    }[side]
    return np.where(cut, empty, images).astype(np.float32)


@pytest.mark.parametrize("side", range(4))
def test_half_drawn_shapes_are_rejected(side):
    rng = np.random.default_rng(10)
    scenes = sample_scenes(rng, 600, "train")
    scenes = Scene(*(field[scenes.count == 1] for field in scenes))
    images = halved(scenes, sample_layouts(rng, scenes), side)
    assert judge(images, captions_for(scenes, rng)).correct.mean() <= 0.01


def disc_like(inside) -> np.ndarray:
    """A large red figure in the middle of a grey image; `inside(x, y)` in units of its radius."""
    y, x = (np.mgrid[:512, :512] + 0.5) / 8
    covered = inside((x - 32) / 12, (y - 32) / 12).reshape(64, 8, 64, 8).mean((1, 3))
    image = 0.6 + covered[..., None] * (np.array(COLOURS["red"]) - 0.6)
    return image[None].astype(np.float32)


FIGURES = {
    "rounded square": lambda x, y: x**4 + y**4 < 0.65,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) < 0.25,
    "ellipse": lambda x, y: np.hypot(x, 1.5 * y) < 1,
    "rectangle": lambda x, y: (np.abs(x) < 1) & (np.abs(y) < 0.5),
    "down triangle": lambda x, y: (y > -0.9) & (1.8 * np.abs(x) < 0.9 - y),
    "X": lambda x, y: (np.minimum(abs(x - y), abs(x + y)) < 0.5) & (np.maximum(abs(x), abs(y)) < 1),
    "T": lambda x, y: (np.abs(x) < 1) & (np.abs(y) < 1) & ((y < -0.28) | (np.abs(x) < 0.36)),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_other_figures_are_none_of_the_four(figure):
    image = disc_like(FIGURES[figure])
    for shape in ("circle", "square", "triangle", "cross"):
        verdict = judge(image, [f"a large red {shape}"])
        assert verdict.presence.all() and not verdict.shape.any()


def test_the_drawn_figure_is_known():
    assert judge(disc_like(lambda x, y: np.hypot(x, y) < 1), ["a large red circle"]).correct.all()


def test_heavy_blur_is_rejected(drawn):
    _, _, images, captions = drawn
    assert judge(blur(images, 3.0), captions).correct.mean() <= 0.05
    assert judge(blur(images, 6.0), captions).correct.mean() <= 0.01


def touching(first: str, second: str) -> np.ndarray:
    image = np.full((1, 64, 64, 3), 0.7, np.float32)
    image[0, 20:41, 8:29] = COLOURS[first]
    image[0, 20:41, 29:50] = COLOURS[second]
    return image


def test_touching_objects_are_told_apart_by_colour():
    caption = "a large red square to the left of a large orange square"
    image = touching("red", "orange")  # neighbours in hue: neither may count as the other's edge
    assert judge(image, [caption]).correct.all()
    np.testing.assert_allclose(np.sort(see(image).centre[0, :, 0]), [18.5, 39.5], atol=0.1)
    assert not judge(touching("red", "red"), [caption.replace("orange", "red")]).presence.any()


def test_more_than_two_objects_are_not_looked_at():
    image = touching("red", "green")
    image[0, 50:60, 20:30] = COLOURS["blue"]
    seen = see(image)
    assert (seen.count == 0).all() and (seen.shape == -1).all()


@pytest.mark.parametrize("colour", [(0.55, 0.04, 0.04), (1.0, 0.45, 0.45)], ids=["maroon", "pink"])
def test_a_colour_far_from_the_palette_has_no_name(colour):
    image = np.full((1, 64, 64, 3), 0.9, np.float32)
    image[0, 20:41, 20:41] = colour
    verdict = judge(image, ["a large red square"])
    assert verdict.shape.all() and not verdict.colour.any()


def test_a_size_between_the_two_has_no_name():
    scenes, layouts, _, _ = draw("train", 60, seed=11)
    scenes = scenes._replace(count=np.ones_like(scenes.count))
    layouts = layouts._replace(
        radius=np.full_like(layouts.radius, 9.5), centre=np.full_like(layouts.centre, 32)
    )
    verdict = judge(render(scenes, layouts), captions_for(scenes, np.random.default_rng(0), "zh"))
    assert verdict.shape.all() and not verdict.size.any()


def test_a_diagonal_is_no_relation():
    scenes, layouts, _, _ = draw("test", 60, seed=12)
    small = scenes._replace(size=np.zeros_like(scenes.size))
    centre = np.broadcast_to(np.float32([[18, 18], [46, 46]]), layouts.centre.shape)
    layouts = layouts._replace(centre=centre, radius=np.full_like(layouts.radius, 7))
    distinct = (small.shape[:, 0] != small.shape[:, 1]) | (small.colour[:, 0] != small.colour[:, 1])
    verdict = judge(render(small, layouts), captions_for(small, np.random.default_rng(0)))
    assert distinct.all() and verdict.shape.all() and not verdict.relation.any()


@pytest.mark.parametrize("size", [32, 48, 128, 200])
def test_other_image_sizes(size):
    scenes, layouts, _, captions = draw("train", 60, seed=13)
    assert judge(render(scenes, layouts, size=size), captions).correct.mean() >= 0.98


def test_see_finds_the_places():
    scenes, layouts, images, _ = draw("test", 50, seed=14)
    seen = see(images)
    assert (seen.count == 2).all()
    row = np.arange(50)
    for i in range(2):
        away = np.linalg.norm(seen.centre - layouts.centre[:, None, i], axis=-1)
        found = away.argmin(-1)
        assert (away.min(-1) <= 0.35 * layouts.radius[:, i]).all()  # a triangle's centroid is low
        assert (seen.colour[row, found] == scenes.colour[:, i]).all()
        assert (seen.shape[row, found] == scenes.shape[:, i]).all()
        assert (seen.size[row, found] == scenes.size[:, i]).all()
    assert seen.iou.min() > 0.95


def test_bad_captions_and_lengths_are_one_clear_line(drawn):
    with pytest.raises(InputError, match="cannot read the caption 'a cat'"):
        judge(drawn[2][:1], ["a cat"])
    with pytest.raises(InputError, match="2 images but 1 captions"):
        judge(drawn[2][:2], drawn[3][:1])
    assert judge(drawn[2][:0], []).correct.shape == (0,)
