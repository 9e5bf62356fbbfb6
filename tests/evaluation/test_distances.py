"""Distances between sets of features, against their definitions written out."""

import numpy as np
import pytest
import torch
from scipy import linalg

from r0_jax.evaluation import distances, statistics


def features(seed, count, width=6, shift=0.0):
    found = np.random.default_rng(seed).standard_normal((count, width)) + shift
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def written_out(x, y):
    """CMMD as the paper's section 4 says it, in PyTorch, pair by pair."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def mean(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * 10.0**2)).mean()

    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def test_cmmd_is_the_papers(monkeypatch):
    x, y = features(0, 70), features(1, 50, shift=0.7)
    monkeypatch.setattr(distances, "_BLOCK", 16)  # several blocks, the last one shorter
    expected = written_out(x, y)
    assert expected > 1
    np.testing.assert_allclose(distances.cmmd(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(distances.cmmd(y, x), expected, rtol=1e-9)
    assert abs(distances.cmmd(x, x[::-1])) < 1e-9
    # In float32 the difference of means near 1 would lose its digits.
    near = features(2, 64)
    small = distances.cmmd(near, near + 1e-4)
    np.testing.assert_allclose(small, written_out(near, near + 1e-4), rtol=1e-4)


def test_the_interval_is_that_of_resampled_sets():
    x, y = features(0, 80), features(1, 60, shift=0.4)
    entry = distances.cmmd_resampled(x, y, seed=3, samples=400).entry()
    assert entry["value"] == pytest.approx(distances.cmmd(x, y))
    rng = np.random.default_rng(9)
    again = [
        distances.cmmd(x[rng.integers(80, size=80)], y[rng.integers(60, size=60)])
        for _ in range(400)
    ]
    low, high = np.quantile(again, (0.025, 0.975)) - np.mean(again) + entry["value"]
    assert entry["ci95"] == pytest.approx([low, high], rel=0.1)
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]


def test_frechet_distance_is_the_definition_with_an_interval():
    x, y = features(0, 90), features(1, 70, shift=0.5)
    entry = distances.frechet_resampled(x, y).entry()
    covariances = [np.cov(found, rowvar=False) for found in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root)
    assert entry["value"] == pytest.approx(expected, rel=1e-8)
    assert entry["ci95"][0] < expected < entry["ci95"][1]


def test_a_difference_of_two_models_is_of_the_same_images_drawn_again():
    """What both have in common cancels: two nearly equal models differ by much less than either."""
    reference, ours = features(0, 300), features(1, 200, shift=0.5)
    other = ours + 0.01 * np.random.default_rng(2).normal(size=ours.shape)
    for distance in (distances.cmmd_resampled, distances.frechet_resampled):
        a, b = distance(ours, reference), distance(other, reference)
        entry, alone = a.less(b), a.entry()
        assert entry["value"] == pytest.approx(a.value - b.value)
        low, high = entry["ci95"]
        assert low < entry["value"] < high
        assert high - low < (alone["ci95"][1] - alone["ci95"][0]) / 5


def test_the_floor_is_what_a_perfect_model_shows():
    reference = features(0, 400)
    found = distances.floor(distances.cmmd, reference, count=100)
    assert (
        found["images"] == 100 and distances.floor(distances.cmmd, reference, 999)["images"] == 200
    )
    perfect = [distances.cmmd(features(seed, 100), reference[:100]) for seed in range(1, 20)]
    assert min(perfect) < found["value"] < max(perfect)
    assert found["value"] < distances.cmmd(features(1, 100, shift=0.5), reference[:100]) / 2
    found = distances.floor(statistics.frechet_distance, reference, count=100)
    assert found["value"] > 0


def test_a_distance_needs_two_rows_and_finite_ones():
    with pytest.raises(ValueError, match="at least 2 rows"):
        distances.cmmd(features(0, 1), features(0, 5))
    broken = np.full((3, 6), np.nan)
    assert np.isnan(distances.cmmd_resampled(broken, features(0, 5), samples=3).entry()["value"])
