"""Scenes: what the captions may rely on, the splits, and NumPy and JAX drawing the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r0_jax.shapes.scene import (
    COLOURS,
    EXTENTS,
    GAP,
    IMAGE_SIZE,
    MARGIN,
    SHAPES,
    SIZES,
    SLANT,
    SPLITS,
    Layout,
    Scene,
    all_scenes,
    canonical,
    coverage,
    render,
    sample_layouts,
    sample_scenes,
    signed_distance,
    split_of,
)


def draw(seed: int, n: int, split: str) -> tuple[Scene, Layout]:
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, n, split)
    return scenes, sample_layouts(rng, scenes)


def kinds(scenes: Scene) -> np.ndarray:
    """One number for each object's shape, colour and size."""
    return (scenes.shape * len(COLOURS) + scenes.colour) * len(SIZES) + scenes.size


def pairs(scenes: Scene) -> set[tuple[int, ...]]:
    return set(map(tuple, np.sort(kinds(scenes)[scenes.count == 2], -1).tolist()))


def test_splits_are_fixed_and_share_no_pair_of_objects():
    number = {split: len(all_scenes(split).count) for split in SPLITS}
    # If these move, every shipped model was trained on scenes that the new test split contains.
    assert number == {"train": 3472, "validation": 440, "test": 504}
    found = [pairs(all_scenes(split)) for split in SPLITS]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert sum(map(len, found)) == 48 * 46 // 2


@pytest.mark.parametrize("split", SPLITS)
def test_samples_stay_in_their_split(split):
    scenes, _ = draw(0, 4000, split)
    assert (split_of(scenes) == SPLITS.index(split)).all()
    single = scenes.count == 1
    assert pairs(scenes) <= pairs(all_scenes(split))
    if split == "train":
        assert 0.22 < single.mean() < 0.28
        assert len(set(kinds(scenes)[single, 0].tolist())) == 48
    else:
        assert not single.any()
    same = (scenes.shape[:, 0] == scenes.shape[:, 1]) & (scenes.colour[:, 0] == scenes.colour[:, 1])
    assert not same[~single].any()
    for field, number in ((scenes.shape, 4), (scenes.colour, 6), (scenes.size, 2)):
        share = np.bincount(field[~single].ravel(), minlength=number) / field[~single].size
        assert (np.abs(share * number - 1) < 0.25).all()


def test_canonical_swaps_the_objects_of_inverse_relations_only():
    scenes, _ = draw(1, 200, "train")
    inverse = Scene(
        scenes.shape[:, ::-1],
        scenes.colour[:, ::-1],
        scenes.size[:, ::-1],
        scenes.count,
        scenes.relation ^ 1,
    )
    pair = scenes.count == 2
    for a, b, c in zip(scenes, canonical(inverse), canonical(scenes), strict=True):
        np.testing.assert_array_equal(a[pair], b[pair])
        np.testing.assert_array_equal(a, c)


def test_layouts_keep_objects_inside_apart_and_in_relation():
    scenes, _ = draw(2, 5000, "train")
    scenes = scenes._replace(relation=np.arange(5000) % 4)  # inverse relations as well
    layouts = sample_layouts(np.random.default_rng(3), scenes)
    pair = scenes.count == 2
    extent = layouts.radius[..., None]
    shown = np.stack([np.ones_like(pair), pair], -1)
    assert (layouts.centre - extent)[shown].min() >= MARGIN - 1e-4
    assert (layouts.centre + extent)[shown].max() <= IMAGE_SIZE - MARGIN + 1e-4
    least, most = np.array(list(SIZES.values())).T
    assert (layouts.radius >= least[scenes.size] - 1e-5).all()
    assert (layouts.radius <= most[scenes.size] + 1e-5).all()

    x, y = np.diff(layouts.centre, axis=1)[:, 0].T
    along = np.select([scenes.relation == i for i in range(4)], [x, -x, y, -y])
    across = np.abs(np.where(scenes.relation < 2, y, x))
    assert (along[pair] >= layouts.radius.sum(-1)[pair] + GAP - 1e-3).all()
    assert (across[pair] <= SLANT * along[pair] + 1e-3).all()
    # and places vary: both thirds of the image are used
    assert layouts.centre[shown].min() < 15 and layouts.centre[shown].max() > 49


def test_backgrounds_are_varied_but_nearly_grey():
    scenes, layouts = draw(4, 2000, "train")
    chroma = np.ptp(layouts.background, -1)
    assert chroma.max() <= 0.1 and chroma.std() > 0.01
    level = layouts.background.mean(-1)
    assert level.min() < 0.3 and level.max() > 0.85
    np.testing.assert_allclose(np.unique(layouts.angle), [0, np.pi / 2], rtol=1e-6)
    drawn = render(scenes, layouts)
    corner, opposite = drawn[:, 0, 0], drawn[:, -1, -1]
    np.testing.assert_allclose(corner, layouts.background[:, 0], atol=0.01)
    np.testing.assert_allclose(opposite, layouts.background[:, 1], atol=0.01)


def test_gradient_runs_along_its_angle():
    scenes, layouts = draw(5, 2, "test")
    layouts = layouts._replace(angle=np.array([0, np.pi / 2], np.float32))
    right, down = render(scenes, layouts)
    np.testing.assert_allclose(right[0, 0], right[-1, 0], atol=1e-6)  # left border: one colour
    np.testing.assert_allclose(down[0, 0], down[0, -1], atol=1e-6)  # upper border
    assert np.abs(right[0, 0] - right[0, -1]).max() > 0.01


@pytest.mark.parametrize(("index", "area"), [(0, np.pi), (1, 3.0976), (2, 1.8), (3, 2.3616)])
def test_shapes_have_their_area_and_extent(index, area):
    centre, radius = np.array([[30.3, 33.8]]), np.array([12.0])
    covered = coverage(signed_distance(np.array([index]), centre, radius))[0]
    assert abs(covered.sum() / 12**2 - area) < 0.02 * area
    rows, columns = np.nonzero(covered > 0.5)
    for got, middle, half in ((columns, 30.3, 0), (rows, 33.8, 1)):
        reach = EXTENTS[index, half] * 12
        # the tip of the triangle is thinner than a pixel
        assert abs(got.min() - (middle - reach)) < (2.5 if SHAPES[index] == "triangle" else 1)
        assert abs(got.max() + 1 - (middle + reach)) < (2.5 if SHAPES[index] == "triangle" else 1)


def test_triangle_points_up():
    covered = coverage(signed_distance(np.array([2]), np.array([[32.0, 32.0]]), np.array([12.0])))[
        0
    ]
    assert covered[:32].sum() < 0.5 * covered[32:].sum()


def test_objects_have_their_colour_and_edges_are_soft():
    scenes, layouts = draw(6, 300, "train")
    images = render(scenes, layouts)
    assert images.shape == (300, 64, 64, 3) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    palette = np.array(list(COLOURS.values()))
    for i in range(2):
        shown = np.flatnonzero(scenes.count > i)
        x, y = layouts.centre[shown, i].astype(int).T
        np.testing.assert_allclose(images[shown, y, x], palette[scenes.colour[shown, i]], atol=1e-6)
    covered = coverage(
        signed_distance(scenes.shape[:, 0], layouts.centre[:, 0], layouts.radius[:, 0])
    )
    soft = ((covered > 0.05) & (covered < 0.95)).any((1, 2))
    assert soft.mean() > 0.98  # all but a few whose straight edges lie between pixels


def test_second_object_is_drawn_only_if_there_is_one():
    scenes, layouts = draw(7, 400, "train")
    single = scenes.count == 1
    alone = render(scenes._replace(count=np.ones_like(scenes.count)), layouts)
    same = (alone == render(scenes, layouts)).all((1, 2, 3))
    np.testing.assert_array_equal(same, single)


def test_jax_draws_the_same_under_jit():
    scenes, layouts = draw(8, 64, "train")
    drawn = jax.jit(lambda s, p: render(s, p, jnp))(scenes, layouts)
    assert drawn.dtype == jnp.float32
    np.testing.assert_allclose(drawn, render(scenes, layouts), atol=2e-5)


def test_sizes_show_the_same_scene():
    scenes, layouts = draw(9, 8, "train")
    big = render(scenes, layouts, size=256)
    small = big.reshape(8, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(small - render(scenes, layouts)).mean() < 2e-3
    assert np.abs(small - render(scenes, layouts)).max() < 0.35  # corners, where edges are sharp


def test_same_seed_same_scenes():
    for a, b in zip(draw(10, 50, "train"), draw(10, 50, "train"), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
