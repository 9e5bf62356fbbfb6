"""Distances between two sets of images, by their features; in float64, block by block.

CMMD (Jayasumana et al. 2024, arXiv 2401.09603) is the maximum mean discrepancy of unit-length
features of CLIP ViT-L/14 at 336 pixels. It needs fewer images than a Frechet distance and assumes
no normal distribution.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from r0_jax.evaluation import statistics

SIGMA, SCALE = 10.0, 1000.0  # of the published kernel, and what the published numbers are times
_BLOCK = 1024  # rows of the kernel's matrix that are held
_WIDE = 1024  # features
_MANY = 40  # replicates

Features = Float[ArrayLike, "n d"]
Reference = Float[ArrayLike, "m d"]
Distance = Callable[[np.ndarray, np.ndarray], float]


def cmmd(ours: Features, reference: Reference) -> float:
    """Return 1000 x the biased squared MMD under exp(-|x - y|^2 / 200), >= 0 but for rounding.

    Both sets are features [N, D] of unit length. Every pair counts, also an image with itself, as
    in the published code; so the value is too large by about 1 / n + 1 / m of the kernel's spread.
    """
    ours, reference = _checked(ours), _checked(reference)
    return float(_weighted(ours, reference, *(np.ones((len(x), 1)) for x in (ours, reference)))[0])


class Resampled(NamedTuple):
    """A distance, and its values when both sets are drawn again with replacement.

    Sets of one size and seed are drawn again alike. So replicates of two models are pairs.
    """

    value: float
    replicates: Float[np.ndarray, " samples"]

    def entry(self) -> dict[str, Any]:
        """Return {"value", "ci95"}."""
        return _entry(self.value, self.replicates)

    def less(self, other: "Resampled") -> dict[str, Any]:
        """Return {"value", "ci95"} of how much larger this distance is, in pairs."""
        return _entry(self.value - other.value, self.replicates - other.replicates)


def cmmd_resampled(
    ours: Features, reference: Reference, seed: int = 0, samples: int = 200
) -> Resampled:
    """Return `cmmd` with its replicates, which share one pass over the pairs."""
    ours, reference = _checked(ours), _checked(reference)
    rng = np.random.default_rng(seed)
    drawn = [
        np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), samples)]).T
        for n in (len(ours), len(reference))
    ]
    value, *replicates = _weighted(ours, reference, *drawn)
    return Resampled(float(value), np.asarray(replicates))


def frechet_resampled(
    ours: Features, reference: Reference, seed: int = 0, samples: int | None = None
) -> Resampled:
    """Return `statistics.frechet_distance` with its replicates.

    By default they are 50, and 16 of wide features, of which each takes seconds.
    """
    ours, reference = _checked(ours), _checked(reference)
    samples = samples or (50 if ours.shape[1] <= _WIDE else 16)
    rng = np.random.default_rng(seed)
    replicates = [
        statistics.frechet_distance(
            *(x[rng.integers(len(x), size=len(x))] for x in (ours, reference))
        )
        for _ in range(samples)
    ]
    return Resampled(statistics.frechet_distance(ours, reference), np.asarray(replicates))


def floor(distance: Distance, reference: Reference, count: int, seed: int = 0) -> dict[str, Any]:
    """Return the distance of two disjoint random parts of the reference, and their size.

    Each part has `count` images, or half of the reference where it is smaller. Between sets of this
    size a perfect model would show the same value.
    """
    reference = np.asarray(reference, np.float64)
    size = min(count, len(reference) // 2)
    order = np.random.default_rng(seed).permutation(len(reference))
    first, second = reference[order[:size]], reference[order[size : 2 * size]]
    return {"value": distance(first, second), "ci95": None, "images": size}


def _checked(features: Features) -> np.ndarray:
    found = np.asarray(features, np.float64)
    if len(found) < 2:
        raise ValueError("a distance between sets needs at least 2 rows on each side")
    return found


def _weighted(
    ours: np.ndarray, reference: np.ndarray, of_ours: np.ndarray, of_reference: np.ndarray
) -> np.ndarray:
    """Return `cmmd` for each column of weights [N, R] and [M, R], which sum to N and M."""
    within = _pairs(ours, ours, of_ours, of_ours) / len(ours) ** 2
    within += _pairs(reference, reference, of_reference, of_reference) / len(reference) ** 2
    across = _pairs(ours, reference, of_ours, of_reference) / (len(ours) * len(reference))
    return SCALE * (within - 2 * across)


def _pairs(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Return the sums over all pairs of weight x kernel x weight, for each column of weights."""
    total = np.zeros(of_a.shape[1])
    squares = np.sum(b**2, axis=1)
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distances = np.sum(a[rows] ** 2, axis=1)[:, None] + squares - 2 * a[rows] @ b.T
        kernel = np.exp(-np.maximum(distances, 0) / (2 * SIGMA**2))
        total += np.sum(of_a[rows] * (kernel @ of_b), axis=0)
    return total


def _entry(value: float, replicates: np.ndarray) -> dict[str, Any]:
    """Return a value with the spread of its replicates around it, as in `bootstrap_ci`."""
    from scipy import special

    count = len(replicates)
    if count >= _MANY:
        low, high = np.quantile(replicates, (0.025, 0.975)) - replicates.mean()
    else:  # too few for quantiles
        high = special.stdtrit(count - 1, 0.975) * replicates.std(ddof=1)
        low = -high
    if not (math.isfinite(value) and math.isfinite(high - low)):
        return {"value": math.nan, "ci95": [math.nan, math.nan]}
    return {"value": value, "ci95": [value + float(low), value + float(high)]}
