"""Intervals against closed forms and coverage; distances against their textbook definitions."""

import math

import numpy as np
import pytest
import scipy.linalg

from r0_jax.evaluation import statistics


def test_proportion_gets_wilson_interval():
    result = statistics.mean_ci(np.array([True] * 9 + [False]))
    assert result["value"] == pytest.approx(0.9)
    # Wilson's ends are where the score test of 9 of 10 just rejects: |0.9 - p| = z sqrt(p(1-p)/n).
    for p in result["ci95"]:
        assert abs(0.9 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 10), abs=1e-6)
    assert result["ci95"][0] < 0.9 < result["ci95"][1] < 1


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_unanimous_proportion_keeps_a_width(outcome):
    low, high = statistics.mean_ci(np.full(100, outcome))["ci95"]
    assert 0 <= low <= outcome <= high <= 1
    assert high - low == pytest.approx(0.0370, abs=1e-4)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_unanimous_proportion_ends_exactly_at_it(outcome):
    """Unguarded, rounding misses the end for most n, on either side of it."""
    for n in range(1, 200):
        interval = statistics.mean_ci(np.full(n, outcome))["ci95"]
        assert interval[int(outcome)] == outcome, n


def test_mean_gets_student_interval():
    result = statistics.mean_ci(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t(0.975, 3 degrees of freedom)
    assert result["value"] == 2.5
    assert result["ci95"] == pytest.approx([2.5 - half, 2.5 + half], abs=1e-5)


def test_mean_interval_covers_the_truth_95_percent_of_the_time():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 12))
    intervals = np.array([statistics.mean_ci(row)["ci95"] for row in draws])
    covered = (intervals[:, 0] <= 3.0) & (intervals[:, 1] >= 3.0)
    assert 0.935 < covered.mean() < 0.965


def test_single_value_has_no_interval_and_empty_input_no_mean():
    assert np.isnan(statistics.mean_ci(np.array([0.3]))["ci95"]).all()
    with pytest.raises(ValueError, match="no values"):
        statistics.mean_ci(np.zeros(0))


def test_a_value_that_is_not_finite_is_not_averaged_away():
    for bad in (np.nan, np.inf):
        result = statistics.mean_ci(np.array([1.0, bad, 1.0]))
        assert np.isnan([result["value"], *result["ci95"]]).all()
    features = np.random.default_rng(0).normal(size=(8, 3))
    assert math.isnan(statistics.frechet_distance(features, np.where(features > 1, np.inf, 0.0)))


def test_paired_interval_resolves_what_shared_noise_hides():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, size=200)
    a, b = shared + 0.05 + rng.normal(0, 0.01, 200), shared
    result = statistics.paired_ci(a, b)
    assert result["ci95"][0] < result["value"] < result["ci95"][1]
    assert 0.045 < result["ci95"][0] and result["ci95"][1] < 0.055
    assert statistics.mean_ci(a)["ci95"][0] < statistics.mean_ci(b)["ci95"][1]  # they overlap


def test_bootstrap_of_a_mean_agrees_with_the_t_interval_and_with_its_seed():
    values = np.random.default_rng(1).normal(size=400)
    result = statistics.bootstrap_ci(np.mean, values, seed=3, samples=2000)
    assert result["ci95"] == pytest.approx(statistics.mean_ci(values)["ci95"], abs=0.02)
    assert result == statistics.bootstrap_ci(np.mean, values, seed=3, samples=2000)
    assert result != statistics.bootstrap_ci(np.mean, values, seed=4, samples=2000)


def test_bootstrap_resamples_whole_rows():
    rows = np.repeat(np.arange(50.0)[:, None], 3, axis=1)
    spread = statistics.bootstrap_ci(lambda rows: float(np.ptp(rows, axis=1).max()), rows)
    assert spread == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_what_is_resampled_together_belongs_together():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 3))
    same = statistics.bootstrap_ci(lambda a, b: float(np.abs(a - b).max()), rows, rows.copy())
    assert same == {"value": 0.0, "ci95": [0.0, 0.0]}
    with pytest.raises(ValueError, match="same number of rows"):
        statistics.bootstrap_ci(np.mean, rows, rows[:40])


def test_bootstrap_interval_holds_the_frechet_distance_it_is_about():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(60, 16)), rng.normal(size=(60, 16)) + 0.1
    result = statistics.bootstrap_ci(statistics.frechet_distance, a, b, samples=100)
    assert result["value"] == statistics.frechet_distance(a, b)
    assert result["ci95"][0] < result["value"] < result["ci95"][1]


@pytest.mark.parametrize(("n", "m"), [(300, 200), (40, 30), (300, 10)])
def test_frechet_distance_equals_the_sqrtm_formula(n, m):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8))
    b = rng.normal(size=(m, 8)) @ rng.normal(size=(8, 8)) + 0.5
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        covariance_a + covariance_b - 2 * scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    )
    assert statistics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_holds_with_fewer_rows_than_dimensions():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(10, 64))
    assert statistics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert statistics.frechet_distance(a, a + 2.0) == pytest.approx(4.0 * 64)
    # Disjoint subspaces share no variance: the distance is all of both.
    b, c = np.zeros((10, 64)), np.zeros((10, 64))
    b[:, :32], c[:, 32:] = rng.normal(size=(10, 32)), rng.normal(size=(10, 32))
    b, c = b - b.mean(0), c - c.mean(0)
    total = b.var(0, ddof=1).sum() + c.var(0, ddof=1).sum()
    assert statistics.frechet_distance(b, c) == pytest.approx(total)


def test_diversity_is_the_mean_distance_of_a_prompts_own_pairs():
    features = np.array(
        [
            [[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]],  # distances 5, 0, 5
            [[9.0, 9.0], [9.0, 9.0], [9.0, 9.0]],
        ]
    )
    np.testing.assert_allclose(statistics.diversity(features), [10 / 3, 0.0])
    with pytest.raises(ValueError, match="at least 2 samples"):
        statistics.diversity(features[:, :1])
