"""Measures means with 95 % intervals, and two distances between sets of features.

Intervals are returned as `{"value": float, "ci95": [low, high]}`, like one entry of eval.json. One
value that is not finite makes the whole entry NaN: an average over the images that happened to work
is not a measurement.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import threadpoolctl
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

_NORMAL_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def mean_ci(values: Shaped[ArrayLike, " n"]) -> dict:
    """Return the mean of n independent values with its 95 % interval.

    Values that are all 0 or 1 are a proportion and get Wilson's score interval. It stays in [0, 1]
    and has a width even at 0 of n and n of n. Other values get Student's t interval of the mean. A
    single value has none: its ci95 is [nan, nan].
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no values to average")
    if not np.isfinite(values).all():
        return _entry(math.nan, math.nan, math.nan)
    mean, n = float(values.mean()), len(values)
    if np.isin(values, (0.0, 1.0)).all():
        return _entry(mean, *_wilson(mean, n))
    if n == 1:
        return _entry(mean, math.nan, math.nan)
    half = _half_width(values)
    return _entry(mean, mean - half, mean + half)


def paired_ci(a: Shaped[ArrayLike, " n"], b: Shaped[ArrayLike, " n"]) -> dict:
    """Return the mean of a - b with its 95 % t interval; a[i] and b[i] share prompt and noise.

    What the two models share cancels. So this resolves differences that two overlapping intervals
    hide. Positive: a is larger.
    """
    return t_ci(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def t_ci(differences: Shaped[ArrayLike, " n"]) -> dict:
    """Return the mean of n paired differences with Student's 95 % interval.

    Raises:
      ValueError: n is below 2.
    """
    differences = np.asarray(differences, np.float64)
    if len(differences) < 2:
        raise ValueError(f"a paired interval needs at least 2 pairs, got {len(differences)}")
    mean, half = float(differences.mean()), _half_width(differences)
    return _entry(mean, mean - half, mean + half)


def bootstrap_ci(
    statistic: Callable[..., float],
    *arrays: Shaped[ArrayLike, "_ ..."],
    seed: int = 0,
    samples: int = 200,
) -> dict:
    """Return `statistic(*arrays)` with a 95 % interval from resampling rows.

    Row i of every array belongs to prompt i, so all arrays are resampled by the same rows: a
    reference that follows the prompts moves with them. The interval is the spread of the
    replicates, moved to the value itself. A replicate repeats rows, which makes a distance between
    sets larger: plain percentiles of frechet_distance can miss the value.

    Raises:
      ValueError: the arrays have different numbers of rows.
    """
    arrays = [np.asarray(array) for array in arrays]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError("arrays that are resampled together need the same number of rows")
    rng, count = np.random.default_rng(seed), len(arrays[0])
    replicates = []
    # Threads of BLAS wait for each other on matrices as small as these, on busy cores for seconds.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for _ in range(samples):
            rows = rng.integers(count, size=count)
            replicates.append(statistic(*(array[rows] for array in arrays)))
        value = float(statistic(*arrays))
    replicates = np.asarray(replicates)
    low, high = np.quantile(replicates, (0.025, 0.975)) - replicates.mean() + value
    return _entry(value, float(low), float(high))


def over_seeds(entry: dict, values: Shaped[ArrayLike, " seeds"]) -> dict:
    """Widen an entry, the mean over seeds, by the spread of the seeds' own values.

    The entry's interval says how the prompts vary. The t interval of the seeds' values says how
    trainings vary. Both add up as independent errors do. One seed tells nothing of trainings, so
    its entry stays.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return entry
    value, (low, high), half = entry["value"], entry["ci95"], _half_width(values)
    return _entry(
        value, value - math.hypot(value - low, half), value + math.hypot(high - value, half)
    )


def p_value(entry: dict) -> float:
    """Return the two-sided p-value of "the value is 0", by an entry's interval as of a normal."""
    low, high = entry["ci95"]
    deviation = (high - low) / 2 / _NORMAL_95
    if not deviation:
        return float(entry["value"] == 0)
    return math.erfc(abs(entry["value"]) / deviation / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being read together (Holm 1979), each 0 to 1.

    To call those below 0.05 different is wrong anywhere in 5 % of all tables at most.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def frechet_distance(
    features_a: Float[ArrayLike, "n d"], features_b: Float[ArrayLike, "m d"]
) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), >= 0.

    The unit is that of the features, squared. The value is too large by roughly 1 / n + 1 / m
    (Chong & Forsyth 2020), so compare only values of the same n and m. With X the centred features
    over sqrt(n - 1), C = X^T X. The square roots of the eigenvalues of C_a C_b are the singular
    values of X_a X_b^T. Their sum needs no sqrtm, takes no root of a negative rounding error, and
    holds when n < d.
    """
    features_a, features_b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError("a Frechet distance needs at least 2 rows on each side")
    if not (np.isfinite(features_a).all() and np.isfinite(features_b).all()):
        return math.nan
    mean_a, root_a = _mean_and_root(features_a)
    mean_b, root_b = _mean_and_root(features_b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap
    return max(float(distance), 0.0)


def diversity(features: Float[ArrayLike, "prompts samples d"]) -> Float[np.ndarray, " prompts"]:
    """Return each prompt's mean Euclidean distance over all pairs of its samples.

    With unit-length features (CLIP embeds) it lies in [0, 2] and means the same for every model.
    """
    features = np.asarray(features, np.float64)
    pairs = list(itertools.combinations(range(features.shape[1]), 2))
    if not pairs:
        raise ValueError("diversity needs at least 2 samples of each prompt")
    return np.mean(
        [np.linalg.norm(features[:, i] - features[:, j], axis=-1) for i, j in pairs], axis=0
    )


def _half_width(values: np.ndarray) -> float:
    """Return half the width of Student's 95 % interval of the mean, for n >= 2 values."""
    from scipy import special

    n = len(values)
    return float(special.stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n))


def _wilson(proportion: float, n: int) -> tuple[float, float]:
    z2 = _NORMAL_95**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (proportion * (1 - proportion) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not push 0 of n or n of n out of its own interval, or an end out of [0, 1].
    return max(0.0, min(centre - half, proportion)), min(1.0, max(centre + half, proportion))


def _mean_and_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and a matrix R, [min(n, d), d], with R^T R = the covariance."""
    mean = features.mean(axis=0)
    root = (features - mean) / math.sqrt(len(features) - 1)
    if len(root) > root.shape[1]:  # same R^T R in d rows instead of n
        root = np.linalg.qr(root, mode="r")
    return mean, root


def _entry(value: float, low: float, high: float) -> dict:
    return {"value": value, "ci95": [low, high]}
