"""Measures signs of reward hacking in images, as multiples of the base's signs on the same noise.

Rewards also rise when colours burn out, when all prompts get the same image, or when images repeat
a pattern with the patches of a vision transformer. These numbers show it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Images = Float[np.ndarray, "b h w 3"]

_LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
_THUMBNAIL = 8  # pixels a side; images of the same layout look the same at this size


def saturation(images: Images) -> float:
    """Return the mean HSV saturation of the pixels, 0 (grey) to 1."""
    high, low = images.max(axis=-1), images.min(axis=-1)
    return float(np.mean((high - low) / np.maximum(high, 1e-6)))


def contrast(images: Images) -> float:
    """Return the standard deviation of luminance within an image, 0 to 0.5; mean over images."""
    return float(np.mean((images @ _LUMA).std(axis=(1, 2))))


def grid_energy(images: Images, grid: int) -> float:
    """Return the share of energy, 0 to 1, that repeats with the patches of a vision transformer.

    It is the energy of luminance, in rows and columns, at multiples of `grid` cycles a side.
    """
    luminance = images @ _LUMA
    total = found = 0.0
    for axis in (1, 2):
        line = luminance - luminance.mean(axis=axis, keepdims=True)
        power = np.abs(np.fft.rfft(line, axis=axis)) ** 2
        found += float(np.take(power, range(grid, power.shape[axis], grid), axis=axis).sum())
        total += float(power.sum())
    return found / total if total else 0.0


def diversity(images: Images) -> float:
    """Return the mean distance between two images' thumbnails; 0 when all are the same."""
    b, h, w, c = images.shape
    rows, columns = (np.arange(n) * _THUMBNAIL // n for n in (h, w))
    small = np.zeros((b, _THUMBNAIL, _THUMBNAIL, c))
    np.add.at(small, (slice(None), rows[:, None], columns[None]), images)
    cells = np.outer(
        np.bincount(rows, minlength=_THUMBNAIL), np.bincount(columns, minlength=_THUMBNAIL)
    )
    small = (small / np.maximum(cells, 1)[None, :, :, None]).reshape(b, -1)
    squares = np.sum(small**2, axis=1)
    distances = squares[:, None] + squares[None] - 2 * small @ small.T
    return float(np.sqrt(np.maximum(distances, 0)).sum() / max(b * (b - 1), 1))


def signs(images: Images, grids: Sequence[int]) -> dict[str, float]:
    """Return all signs by name; `grids` are the patches a side of the rewards' towers."""
    found = {
        "saturation": saturation(images),
        "contrast": contrast(images),
        "diversity": diversity(images),
    }
    return found | {f"grid_energy_{grid}": grid_energy(images, grid) for grid in sorted(set(grids))}


def relative(now: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Return each sign divided by the base's; 1 is no change, or a sign that neither shows."""
    return {name: (value + 1e-12) / (base[name] + 1e-12) for name, value in now.items()}
