"""Scenes of one or two coloured shapes: their content, their layout, and the image.

Coordinates are pixels of a 64 x 64 image, x to the right and y down; `render` scales them to
any size. This module uses only NumPy, so the judge and captions need no accelerator library. With
`jax.numpy` as `xp`, `render` can be jitted.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

SHAPES = ("circle", "square", "triangle", "cross")
# Saturated, with distant hues (0, 29, 57, 129, 226, 283 degrees): the judge goes by hue.
COLOURS = {
    "red": (0.90, 0.08, 0.08),
    "green": (0.05, 0.70, 0.15),
    "blue": (0.10, 0.30, 0.95),
    "yellow": (0.97, 0.92, 0.05),
    "purple": (0.60, 0.10, 0.80),
    "orange": (1.00, 0.48, 0.00),
}
SIZES = {"small": (6.5, 7.5), "large": (11.5, 13.0)}  # radius in pixels: least, most
RELATIONS = ("left of", "right of", "above", "below")  # of object 0 to object 1; inverse: xor 1
SPLITS = ("train", "validation", "test")

IMAGE_SIZE = 64
SINGLE_SHARE = 0.25  # of the training scenes have one object
MARGIN = 1.5  # pixels between an object and the border
GAP = 3.0  # least pixels between two objects, along the axis of their relation
SLANT = 0.4  # largest offset across that axis, as a share of the distance along it
# Half-extents (x, y) of each shape for radius 1; the shapes then look equally big.
EXTENTS = np.array([[1.0, 1.0], [0.88, 0.88], [1.0, 0.9], [1.0, 1.0]], np.float32)
ARM = 0.36  # half the width of a cross's arms


class Scene(NamedTuple):
    """The content of scenes, which captions describe.

    Where count is 1, the fields of object 1 and `relation` are 0.
    """

    shape: Int[Any, "*b 2"]
    colour: Int[Any, "*b 2"]
    size: Int[Any, "*b 2"]
    count: Int[Any, "*b"]
    relation: Int[Any, "*b"]


class Layout(NamedTuple):
    """The parts of a scene that captions do not describe: positions, exact sizes, background."""

    centre: Float[Any, "*b 2 2"]  # (x, y) of each object's bounding box
    radius: Float[Any, "*b 2"]
    background: Float[Any, "*b 2 3"]  # colours at the two ends of the gradient
    angle: Float[Any, "*b"]  # of the gradient, in radians: 0 is right, pi / 2 is down


def canonical(scenes: Scene) -> Scene:
    """Return the same scenes, reordered so that object 0 is left of or above object 1."""
    swap = scenes.relation % 2 == 1
    shape, colour, size = (
        np.where(swap[..., None], field[..., ::-1], field) for field in scenes[:3]
    )
    return Scene(shape, colour, size, scenes.count, scenes.relation - swap)


def _hash(values: np.ndarray) -> np.ndarray:
    """Hash small ints to uint64, equally on every machine (splitmix64)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def split_of(scenes: Scene) -> Int[np.ndarray, "*b"]:
    """Return indices into SPLITS.

    Only the unordered pair of objects decides. So training never shows the two objects of a test
    scene together, in any relation. Scenes of one object belong to train.
    """
    kind = (scenes.shape * len(COLOURS) + scenes.colour) * len(SIZES) + scenes.size
    kinds = len(SHAPES) * len(COLOURS) * len(SIZES)
    bucket = _hash(kind.min(-1) * kinds + kind.max(-1)) % np.uint64(10)
    return np.where(scenes.count == 1, 0, np.where(bucket == 0, 2, np.where(bucket == 1, 1, 0)))


@functools.cache
def all_scenes(split: str) -> Scene:
    """Return all canonical two-object scenes of a split; the objects differ in shape or colour."""
    kinds = (len(SHAPES), len(COLOURS), len(SIZES))
    grid = np.indices((*kinds, *kinds, 2), np.int32).reshape(7, -1)
    grid = grid[:, (grid[0] != grid[3]) | (grid[1] != grid[4])]
    shape, colour, size = (np.stack([grid[i], grid[i + 3]], -1) for i in range(3))
    scenes = Scene(shape, colour, size, np.full(len(shape), 2, np.int32), 2 * grid[6])
    return Scene(*(field[split_of(scenes) == SPLITS.index(split)] for field in scenes))


def sample_scenes(rng: np.random.Generator, n: int, split: str) -> Scene:
    """Draw n canonical scenes; in train a quarter has one object, the others have two."""
    pairs = all_scenes(split)
    index = rng.integers(len(pairs.count), size=n)
    shape, colour, size, count, relation = (field[index] for field in pairs)
    if split == "train":
        single = rng.random(n) < SINGLE_SHARE
        kinds = (len(SHAPES), len(COLOURS), len(SIZES))
        for field, number in zip((shape, colour, size), kinds, strict=True):
            alone = np.stack([rng.integers(number, size=n), np.zeros(n, int)], -1)
            field[single] = alone[single]
        count[single], relation[single] = 1, 0
    return Scene(shape, colour, size, count, relation)


def _backgrounds(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw two colours per image [n, 2, 3]: dark grey to near-white, slightly warm or cool."""
    first = rng.uniform(0.2, 0.93, (n, 1))
    second = np.clip(first + rng.uniform(-0.3, 0.3, (n, 1)), 0.2, 0.93)
    level = np.stack([first, second], 1)  # [n, 2, 1]
    warmth = rng.uniform(-0.04, 0.04, (n, 1, 1)) * np.array([1.0, 0.2, -1.0])
    return np.clip(level + warmth, 0, 1)


def sample_layouts(rng: np.random.Generator, scenes: Scene) -> Layout:
    """Draw one layout per scene: objects lie inside the image, apart, and in a clear relation."""
    n = len(scenes.count)
    least, most = np.array(list(SIZES.values())).T
    radius = rng.uniform(least[scenes.size], most[scenes.size])
    low, high = MARGIN + radius, IMAGE_SIZE - MARGIN - radius  # [n, 2], for both coordinates

    nearest = radius.sum(-1) + GAP
    distance = rng.uniform(nearest, IMAGE_SIZE - 2 * MARGIN - radius.sum(-1))
    # `head` is the object with the smaller coordinate along the axis of the relation.
    head = (scenes.relation % 2)[:, None]
    head_low = np.take_along_axis(low, head, -1)[:, 0]
    tail_high = np.take_along_axis(high, 1 - head, -1)[:, 0]
    start = rng.uniform(head_low, tail_high - distance)
    along = np.where(np.arange(2) == head, start[:, None], (start + distance)[:, None])

    across = rng.uniform(low, high)
    reach = SLANT * distance
    across[:, 1] = rng.uniform(
        np.maximum(low[:, 1], across[:, 0] - reach), np.minimum(high[:, 1], across[:, 0] + reach)
    )
    vertical = (scenes.relation >= 2)[:, None, None]
    pair = np.where(vertical, np.stack([across, along], -1), np.stack([along, across], -1))
    anywhere = rng.uniform(low[..., None], high[..., None], (n, 2, 2))
    centre = np.where((scenes.count == 1)[:, None, None], anywhere, pair)
    angle = rng.integers(2, size=n) * (np.pi / 2)
    return Layout(*(a.astype(np.float32) for a in (centre, radius, _backgrounds(rng, n), angle)))


def signed_distance(
    shape: Int[Any, "*b"],
    centre: Float[Any, "*b 2"],
    radius: Float[Any, "*b"],
    xp: ModuleType = np,
    size: int = IMAGE_SIZE,
) -> Float[Any, "*b h w"]:
    """Return the distance from the outline to each pixel's middle; negative inside.

    The unit is a pixel of an image of IMAGE_SIZE.
    """
    pixel = (xp.arange(size, dtype=xp.float32) + 0.5) * (IMAGE_SIZE / size)
    pixel = pixel.reshape((1,) * radius.ndim + (size,))
    x = (pixel - centre[..., 0, None])[..., None, :]  # [..., 1, w]
    y = (pixel - centre[..., 1, None])[..., :, None]  # [..., h, 1]
    r = radius[..., None, None]

    circle = xp.sqrt(x * x + y * y) - r
    square = xp.maximum(xp.abs(x), xp.abs(y)) - EXTENTS[1, 0] * r
    half_width, half_height = EXTENTS[2]
    slope = np.hypot(2 * half_height, half_width)
    side = (2 * half_height * xp.abs(x) - half_width * (y + half_height * r)) / slope
    triangle = xp.maximum(side, y - half_height * r)
    bar = xp.maximum(xp.abs(x) - r, xp.abs(y) - ARM * r)
    post = xp.maximum(xp.abs(x) - ARM * r, xp.abs(y) - r)
    cross = xp.minimum(bar, post)

    kind = shape[..., None, None]
    return xp.where(
        kind < 2, xp.where(kind == 0, circle, square), xp.where(kind == 2, triangle, cross)
    )


def coverage(distance: Float[Any, "*b h w"], xp: ModuleType = np) -> Float[Any, "*b h w"]:
    """Return the share of each pixel that a shape covers; the edge is one pixel wide."""
    return xp.clip(0.5 - distance * (distance.shape[-1] / IMAGE_SIZE), 0, 1).astype(xp.float32)


def render(
    scenes: Scene, layouts: Layout, xp: ModuleType = np, size: int = IMAGE_SIZE
) -> Float[Any, "b h w 3"]:
    """Render scenes as float32 images [b, h, w, 3] in [0, 1]."""
    outlines = signed_distance(scenes.shape, layouts.centre, layouts.radius, xp, size)
    return paint(scenes, layouts, outlines, xp)


def paint(
    scenes: Scene, layouts: Layout, outlines: Float[Any, "b 2 h w"], xp: ModuleType = np
) -> Float[Any, "b h w 3"]:
    """Render objects of any outlines, given by their signed distances [b, 2, h, w]."""
    size = outlines.shape[-1]
    ramp = (xp.arange(size, dtype=xp.float32) + 0.5) / size
    cos, sin = (f(layouts.angle)[:, None, None] for f in (xp.cos, xp.sin))
    mix = (cos * ramp[None, None, :] + sin * ramp[None, :, None])[..., None]  # [b, h, w, 1]
    first, second = (layouts.background[:, i, None, None, :] for i in (0, 1))
    images = first + mix * (second - first)

    palette = xp.asarray(np.array(list(COLOURS.values()), np.float32))
    for i in range(2):
        shown = (scenes.count > i)[:, None, None]
        alpha = xp.where(shown, coverage(outlines[:, i], xp), 0.0)[..., None]
        images = images + alpha * (palette[scenes.colour[:, i]][:, None, None, :] - images)
    return images.astype(xp.float32)
