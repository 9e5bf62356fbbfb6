"""An exact judge: does an image show what its caption says? It analyses images; nothing is trained.

The judge groups saturated pixels by the nearest palette hue into connected components. It fits
the four ideal shapes to each component, and compares the result with the parsed caption. It first
resamples images of another size to 64 x 64, so every length here is in those pixels.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from r0_jax.errors import InputError
from r0_jax.shapes.captions import parse
from r0_jax.shapes.scene import (
    ARM,
    COLOURS,
    EXTENTS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    signed_distance,
)

PALETTE = np.array(list(COLOURS.values()), np.float32)
MIN_IOU = 0.84  # with the best ideal shape; clean objects have 0.97, blurred by 1 pixel 0.86
MIN_AREA = 20.0  # square pixels of an object; the smallest rendered object has 70
MIN_LEAD = 0.04  # of the best shape's IoU over the second best; a rounded square has less
MAX_SOFTNESS = 0.7  # width of edges in pixels; clean objects have 0.17, blurred by 1 pixel 0.45
CONTRAST = 3.0  # factor that sharpens edges, so that a slight blur does not count
COLOUR_TOLERANCE = 0.3  # RGB distance of an object's mean colour from the palette's
SIZE_TOLERANCE = 1.5  # pixels that a radius may lie outside its range in SIZES
SLANT_TOLERANCE = 0.75  # offset across the relation's axis / offset along it; rendered: 0.4
CLUTTER_LEVEL = 0.2  # visible difference from a smooth background
CLUTTER_AREA = 16.0  # square pixels of clutter that count as an extra object
# Each shape at radius 1: its area, the drop of its centroid below the centre of its bounding
# box, and the length of its outline.
UNIT_AREA = np.array([np.pi, 4 * EXTENTS[1, 0] ** 2, 2 * EXTENTS[2, 1], 4 * ARM * (2 - ARM)])
CENTROID_DROP = np.array([0.0, 0.0, EXTENTS[2, 1] / 3, 0.0])
UNIT_PERIMETER = np.array([2 * np.pi, 8 * EXTENTS[1, 0], 2 + 2 * np.hypot(1, 2 * EXTENTS[2, 1]), 8])
CHUNK = 64  # images analysed at a time, to bound memory


class Verdict(NamedTuple):
    """Verdicts per image. All are False where `presence` is; `relation` is True for one object."""

    presence: Bool[np.ndarray, " b"]  # the caption's number of objects, and nothing else
    colour: Bool[np.ndarray, " b"]
    shape: Bool[np.ndarray, " b"]
    size: Bool[np.ndarray, " b"]
    relation: Bool[np.ndarray, " b"]
    correct: Bool[np.ndarray, " b"]  # all of the above, for the same matching of objects to words


class Objects(NamedTuple):
    """The objects found in images, at most two per image; -1 marks an unknown attribute."""

    count: np.ndarray  # [b]; 0 for more than two objects or for clutter
    colour: np.ndarray  # [b, 2]
    shape: np.ndarray  # [b, 2]
    size: np.ndarray  # [b, 2]
    centre: np.ndarray  # [b, 2, 2] centroids, (x, y)
    iou: np.ndarray  # [b, 2] with the best shape


def judge(images: Float[Any, "b h h 3"], captions: list[str]) -> Verdict:
    """Judge each image [b, h, h, 3] in [0, 1] against its caption.

    Raise InputError for a caption outside the grammar of captions.py.
    """
    if len(images) != len(captions):
        raise InputError(f"{len(images)} images but {len(captions)} captions: give one for each")
    asked = [parse(caption) for caption in captions]
    for scene, caption in zip(asked, captions, strict=True):
        if scene is None:
            raise InputError(f"the judge cannot read the caption {caption!r}: use captions.py's")
    if not asked:
        return Verdict(*(np.zeros(0, bool) for _ in Verdict._fields))
    asked = Scene(*(np.stack(field) for field in zip(*asked, strict=True)))
    return compare(see(images), asked)


def see(images: Float[Any, "b h h 3"]) -> Objects:
    """Find the objects in each image."""
    chunks = [
        _see(_resample(np.nan_to_num(np.asarray(images[i : i + CHUNK], np.float32)).clip(0, 1)))
        for i in range(0, len(images), CHUNK)
    ]
    return Objects(*(np.concatenate(field) for field in zip(*chunks, strict=True)))


def compare(seen: Objects, asked: Scene) -> Verdict:
    """Return verdicts for the better of the two matchings of seen objects to asked objects."""
    presence = seen.count == asked.count
    single = asked.count == 1
    unused = np.stack([np.zeros_like(single), single], -1)  # slots without an object
    matchings = []
    for order in ([0, 1], [1, 0]):
        attributes = [
            ((got[:, order] == want) | unused).all(-1)
            for got, want in zip(
                (seen.colour, seen.shape, seen.size),
                (asked.colour, asked.shape, asked.size),
                strict=True,
            )
        ]
        x, y = np.diff(seen.centre[:, order], axis=1)[:, 0].T  # from object 0 to object 1
        along = np.stack([x, -x, y, -y], -1)[np.arange(len(x)), asked.relation]
        across = np.abs(np.where(asked.relation < RELATIONS.index("above"), y, x))
        attributes.append(single | (across < SLANT_TOLERANCE * along))
        matchings.append(np.stack(attributes, -1) & presence[:, None])
    straight, swapped = matchings
    weight = np.array([4, 3, 2, 1])  # colour counts most: it identifies the object
    better = (swapped @ weight > straight @ weight) & ~single
    attributes = np.where(better[:, None], swapped, straight)
    return Verdict(presence, *attributes.T, attributes.all(-1))


def _resample(images: np.ndarray) -> np.ndarray:
    """Resample images to IMAGE_SIZE: area means to shrink them, linear interpolation to grow."""
    side = images.shape[1]
    if side == IMAGE_SIZE:
        return images
    step = side / IMAGE_SIZE
    start = (np.arange(IMAGE_SIZE)[:, None] + 0.5) * step - max(step, 1) / 2
    pixel = np.arange(side)
    weight = np.minimum(start + max(step, 1), pixel + 1) - np.maximum(start, pixel)
    weight = weight.clip(0).astype(np.float32)
    weight /= weight.sum(1, keepdims=True)
    return np.einsum("ij,kl,bjlc->bikc", weight, weight, images, optimize=True)


def _hue(rgb: np.ndarray) -> np.ndarray:
    r, g, b = np.moveaxis(rgb, -1, 0)
    return np.arctan2(3**0.5 * (g - b), 2 * r - g - b)


def _see(images: np.ndarray) -> Objects:
    number = len(images)
    owner, rgb, labels = _components(images)
    background, cluttered = _background(images, labels > 0)
    per_image = np.bincount(owner, minlength=number)
    count = np.where((per_image > 2) | cluttered, 0, per_image)

    # The slot of each component in its image. Only images with 1 or 2 components count.
    kept = np.flatnonzero(count[owner] > 0)
    image, rgb = owner[kept], rgb[kept]
    slot = np.zeros(len(kept), int)
    slot[1:] = image[1:] == image[:-1]
    seen = Objects(
        count,
        *(np.full((number, 2), -1) for _ in range(3)),
        np.zeros((number, 2, 2)),
        np.zeros((number, 2)),
    )
    if len(kept):
        distance = np.linalg.norm(rgb[:, None] - PALETTE, axis=-1)
        colour = np.where(distance.min(-1) < COLOUR_TOLERANCE, distance.argmin(-1), -1)
        masks = labels[image] == (kept + 1)[:, None, None]
        others = (labels[image] > 0) & ~masks
        covered = _covered(images[image], background[image], rgb, masks, others)
        shape, radius, centre, iou = _fit(covered)
        seen.shape[image, slot] = shape
        seen.size[image, slot] = _size(radius)
        seen.colour[image, slot] = colour
        seen.centre[image, slot] = centre
        seen.iou[image, slot] = iou
    return seen


def _components(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find the candidate objects.

    Return the image [n] and mean colour [n, 3] of each object, ordered by image, and labels
    [b, h, w]: 1 + index of the object, or 0.
    """
    r, g, b = np.moveaxis(images, -1, 0)
    chroma = np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)
    turn = np.abs(_hue(images)[..., None] - _hue(PALETTE))
    nearest = np.minimum(turn, 2 * np.pi - turn).argmin(-1)
    # An edge pixel that is half covered has half the palette's chroma.
    covered = chroma > 0.5 * (PALETTE.max(-1) - PALETTE.min(-1))[nearest]

    plane = np.zeros((3, 3, 3), bool)  # neighbours within an image, not across the batch
    plane[1] = True
    labels = np.zeros(images.shape[:3], np.int64)
    cores = np.zeros(images.shape[:3], np.int64)
    total = 0
    for colour in range(len(PALETTE)):
        mask = covered & (nearest == colour)
        found, number = ndimage.label(mask, plane)
        labels[mask] = found[mask] + total
        # An object needs a core: mixed colours at an edge are only one or two pixels wide.
        core = ndimage.minimum_filter(mask, (1, 3, 3))
        cores[core] = labels[core]
        total += number

    area = np.bincount(labels.ravel(), minlength=total + 1)
    core_area = np.bincount(cores.ravel(), minlength=total + 1)
    keep = (area >= MIN_AREA) & (core_area > 0)
    keep[0] = False
    first = np.zeros(total + 1, np.int64)
    first[labels] = np.arange(len(images))[:, None, None]
    order = np.flatnonzero(keep)
    order = order[np.argsort(first[order], kind="stable")]

    inside = cores > 0
    rgb = np.stack([np.bincount(cores[inside], v, total + 1) for v in images[inside].T], -1)
    rgb = (rgb[order] / core_area[order, None]).astype(np.float32)

    renumber = np.zeros(total + 1, np.int64)
    renumber[order] = np.arange(1, len(order) + 1)
    return first[order], rgb, renumber[labels]


def _background(images: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a background [b, h, w, 3], linear in x and y; return it and where clutter exists [b].

    Clutter differs from the background but does not belong to an object.
    """
    number, side = images.shape[:2]
    free = ~ndimage.maximum_filter(objects, (1, 7, 7))
    ramp = (np.arange(side) + 0.5) / side - 0.5
    plane = np.stack([np.ones((side, side)), *np.meshgrid(ramp, ramp)], -1).reshape(-1, 3)
    weighted = np.swapaxes(plane * free.reshape(number, -1, 1), 1, 2)
    gram = weighted @ plane + 1e-3 * np.eye(3)
    fitted = (plane @ np.linalg.solve(gram, weighted @ images.reshape(number, -1, 3))).reshape(
        images.shape
    )
    departure = ndimage.uniform_filter(images - fitted, (1, 3, 3, 1))
    clutter = (np.abs(departure).max(-1) > CLUTTER_LEVEL) & free
    return fitted.astype(np.float32), clutter.sum((1, 2)) >= CLUTTER_AREA


def _harder(share: np.ndarray) -> np.ndarray:
    return (CONTRAST * (share - 0.5) + 0.5).clip(0, 1)


def _covered(images, background, rgb, masks, others) -> np.ndarray:
    """Return the share of each pixel that each object covers [n, h, w], 0 to 1.

    It is the pixel's position between the colours of the background and of the object.
    """
    near = ndimage.maximum_filter(masks, (1, 3, 3))
    whole = rgb[:, None, None] - background
    dot = "nhwc,nhwc->nhw"
    share = np.einsum(dot, images - background, whole)
    share /= np.maximum(np.einsum(dot, whole, whole), 1e-3)
    return np.where(near & ~others, share.clip(0, 1), 0)


def _fit(covered: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return shape [n], radius [n], centroid [n, 2] and best IoU [n] of objects [n, h, w].

    Compare each object with ideal shapes of the same area and centroid. The shape is -1 if none
    fits well enough.
    """
    side = covered.shape[-1]
    pixel = np.arange(side, dtype=np.float32) + 0.5
    area = np.maximum(covered.sum((1, 2)), 1e-3)
    centroid = np.stack([covered.sum(1) @ pixel, covered.sum(2) @ pixel], -1) / area[:, None]
    radius = np.sqrt(area[:, None] / UNIT_AREA).astype(np.float32)  # [n, shapes]
    hard = _harder(covered)
    ious = []
    for shape in range(len(SHAPES)):
        r = radius[:, shape]
        centre = centroid - np.stack([np.zeros_like(r), CENTROID_DROP[shape] * r], -1)
        outline = signed_distance(np.full(len(r), shape), centre.astype(np.float32), r)
        ideal = _harder(coverage(outline))
        union = np.maximum(np.maximum(ideal, hard).sum((1, 2)), 1e-3)
        ious.append(np.minimum(ideal, hard).sum((1, 2)) / union)
    ious = np.stack(ious, -1)
    best = ious.argmax(-1)
    second, first = np.sort(ious, -1)[:, -2:].T
    radius = radius[np.arange(len(best)), best]
    softness = (covered * (1 - covered)).sum((1, 2)) / (UNIT_PERIMETER[best] * radius)
    clear = (first >= MIN_IOU) & (first - second >= MIN_LEAD) & (softness <= MAX_SOFTNESS)
    return np.where(clear, best, -1), radius, centroid, first


def _size(radius: np.ndarray) -> np.ndarray:
    """Return indices into SIZES, or -1 for a radius clearly outside every range."""
    size = np.full(radius.shape, -1)
    for index, (least, most) in enumerate(SIZES.values()):
        within = (radius > least - SIZE_TOLERANCE) & (radius < most + SIZE_TOLERANCE)
        size[within] = index
    return size
