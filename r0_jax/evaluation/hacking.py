"""Measures signs of reward hacking in images, as multiples of the base's signs on the same noise.

Rewards also rise when colours burn out, when all prompts get the same image, when images fill with
outlines or darkness, or when they repeat a pattern with the patches of a vision transformer. These
numbers show it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r0_jax.errors import InputError

VETOED = "hacking/vetoed"  # the metric that keeps a checkpoint from being the best
_LUMA = (0.299, 0.587, 0.114)
_MEANS = ("saturation", "contrast", "edges", "dark", "colour_entropy")
_DARK = 0.05  # luminance
_SHADES = 4  # of red, green and blue each, in the histogram of colours
_THUMBNAIL = 8  # pixels a side; images of the same layout look the same at this size

Rows = Float[np.ndarray, "n columns"]


@functools.partial(jax.jit, static_argnames="grids")
def look(images: Float[Array, "b h w 3"], grids: tuple[int, ...]) -> Float[Array, "b columns"]:
    """Return what the signs need to know of each image, to be joined by `signs`.

    The columns are the means of `_MEANS`, the energy of luminance and its part in each grid, and
    the pixels of a thumbnail. `grids` are the patches a side of the rewards' towers.
    """
    luminance = images @ jnp.asarray(_LUMA, images.dtype)
    energies = [_energies(luminance, axis, grids) for axis in (1, 2)]
    means = {
        "saturation": _saturation(images),
        "contrast": luminance.std(axis=(1, 2)),
        "edges": _edges(luminance),
        "dark": jnp.mean(luminance < _DARK, axis=(1, 2)),
        "colour_entropy": _colour_entropy(images),
    }
    columns = [
        jnp.stack([means[name] for name in _MEANS], axis=1),
        sum(energies, start=jnp.zeros(())),
        _thumbnails(images),
    ]
    return jnp.concatenate(columns, axis=1)


def signs(rows: Rows, grids: Sequence[int]) -> dict[str, float]:
    """Return all signs by name, of the images whose rows `look` returned for `grids`.

    saturation: mean HSV saturation of the pixels, 0 (grey) to 1. contrast: standard deviation of
    luminance within an image, 0 to 0.5. edges: mean step of luminance between neighbours, 0 to 1.
    dark: the share of pixels that are nearly black. colour_entropy: of the histogram of an image's
    colours, in bits, 0 (one colour) to 6. These five are means over images. diversity: mean
    distance between two images' thumbnails, 0 when all are the same. grid_energy_N: the share of
    energy, 0 to 1, that repeats with N patches a side: luminance, in rows and columns, at multiples
    of N cycles.
    """
    rows, first = np.asarray(rows, np.float64), len(_MEANS)
    total, parts = rows[:, first].sum(), rows[:, first + 1 : first + 1 + len(grids)].sum(axis=0)
    found = dict(zip(_MEANS, rows[:, :first].mean(axis=0).tolist(), strict=True))
    found["diversity"] = _diversity(rows[:, first + 1 + len(grids) :])
    energies = {
        f"grid_energy_{grid}": float(part / total) if total else 0.0
        for grid, part in zip(grids, parts, strict=True)
    }
    return found | dict(sorted(energies.items()))


def of_images(rows: Rows) -> dict[str, Float[np.ndarray, " n"]]:
    """Return those of the signs that each image has by itself: the five means of `signs`."""
    return {name: np.asarray(rows[:, i], np.float64) for i, name in enumerate(_MEANS)}


def relative(now: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Return each sign divided by the base's; 1 is no change, or a sign that neither shows.

    Of dark pixels 1 % is added to both: most images have none.
    """
    least = {"dark": 0.01}
    return {
        name: (value + least.get(name, 1e-12)) / (base[name] + least.get(name, 1e-12))
        for name, value in now.items()
    }


def check_bounds(bounds: Mapping[str, Any], grids: Sequence[int]) -> None:
    """Raise InputError unless `bounds` is {sign: (least, most)} of signs that are measured."""
    known = (*_MEANS, "diversity", *(f"grid_energy_{grid}" for grid in grids))
    for name, pair in bounds.items():
        if name not in known:
            raise InputError(f"veto.{name} is not a sign of hacking here; use {', '.join(known)}")
        try:
            least, most = pair
            valid = 0 <= least <= most < math.inf
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise InputError(
                f"veto.{name}={pair!r} must be two numbers (least, most), multiples of what the "
                "untrained generator shows, such as (0.5, 2.0)"
            )


def outside(
    multiples: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Return those of the signs that do not lie within their (least, most)."""
    return {
        name: multiples[name]
        for name, (least, most) in bounds.items()
        if not least <= multiples[name] <= most
    }


def _saturation(images: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
    high, low = images.max(axis=-1), images.min(axis=-1)
    return jnp.mean((high - low) / jnp.maximum(high, 1e-6), axis=(1, 2))


def _edges(luminance: Float[Array, "b h w"]) -> Float[Array, " b"]:
    steps = (jnp.abs(jnp.diff(luminance, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2))
    return sum(steps, start=jnp.zeros(())) / 2


def _colour_entropy(images: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
    shades = jnp.clip((images * _SHADES).astype(jnp.int32), 0, _SHADES - 1)
    colours = shades @ jnp.asarray([_SHADES**2, _SHADES, 1])
    count = jax.vmap(lambda x: jnp.bincount(x.ravel(), length=_SHADES**3))(colours)
    share = count / colours[0].size
    return -jnp.sum(jnp.where(share > 0, share * jnp.log2(jnp.maximum(share, 1e-12)), 0), axis=1)


def _energies(
    luminance: Float[Array, "b h w"], axis: int, grids: tuple[int, ...]
) -> Float[Array, "b parts"]:
    """Return the energy along an axis, without the mean, and its parts at multiples of grids."""
    line = luminance - luminance.mean(axis=axis, keepdims=True)
    power = jnp.abs(jnp.fft.rfft(line, axis=axis)) ** 2
    power = power.sum(axis=3 - axis)  # of all lines
    multiples = [power[:, grid::grid].sum(axis=1) for grid in grids]
    return jnp.stack([power.sum(axis=1), *multiples], axis=1)


def _thumbnails(images: Float[Array, "b h w 3"]) -> Float[Array, "b pixels"]:
    """Return means over the cells of an 8 x 8 grid; cells without a pixel are 0."""

    def means(size: int) -> Float[np.ndarray, "8 size"]:
        cells = np.arange(size) * _THUMBNAIL // size
        inside = cells[None] == np.arange(_THUMBNAIL)[:, None]
        return (inside / np.maximum(inside.sum(axis=1, keepdims=True), 1)).astype(np.float32)

    rows, columns = (means(size) for size in images.shape[1:3])
    return jnp.einsum("rh,bhwc,sw->brsc", rows, images, columns).reshape(len(images), -1)


def _diversity(thumbnails: Float[np.ndarray, "n pixels"]) -> float:
    squares = np.sum(thumbnails**2, axis=1)
    distances = squares[:, None] + squares[None] - 2 * thumbnails @ thumbnails.T
    count = len(thumbnails)
    return float(np.sqrt(np.maximum(distances, 0)).sum() / max(count * (count - 1), 1))
