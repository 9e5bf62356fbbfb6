import numpy as np
import pytest
from torch_preprocess import noise

from r0_jax.evaluation import hacking

GREY = np.full((3, 32, 48, 3), 0.5, np.float32)


def test_saturation():
    assert hacking.saturation(GREY) == 0
    pure = np.zeros_like(GREY)
    pure[..., 1] = 0.4
    np.testing.assert_allclose(hacking.saturation(pure), 1)
    np.testing.assert_allclose(hacking.saturation((GREY + pure) / 2), 0.2 / 0.45, rtol=1e-6)


def test_contrast():
    assert hacking.contrast(GREY) == 0
    halves = GREY.copy()
    halves[:, :16], halves[:, 16:] = 0, 1
    np.testing.assert_allclose(hacking.contrast(halves), 0.5, rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_energy_on_the_grid_of_patches(axis):
    n = GREY.shape[axis]
    wave = np.cos(2 * np.pi * 4 * np.arange(n) / n).reshape(
        [-1 if i == axis else 1 for i in range(4)]
    )
    striped = (GREY + 0.2 * wave).astype(np.float32)
    assert hacking.grid_energy(GREY, 4) == 0
    np.testing.assert_allclose(hacking.grid_energy(striped, 4), 1, rtol=1e-5)
    np.testing.assert_allclose(hacking.grid_energy(striped, 2), 1, rtol=1e-5)  # a harmonic of it
    assert hacking.grid_energy(striped, 3) < 1e-6
    assert 0 < hacking.grid_energy(noise(32, 32), 4) < 0.4


def test_diversity():
    assert hacking.diversity(GREY) < 1e-6
    images = noise(32, 48)
    small = images.reshape(2, 8, 4, 8, 6, 3).mean((2, 4))
    np.testing.assert_allclose(
        hacking.diversity(images), np.linalg.norm(small[0] - small[1]), rtol=1e-5
    )
    assert hacking.diversity(noise(5, 7)) > 0  # smaller than a thumbnail


def test_signs_are_multiples_of_the_bases():
    images = noise(32, 32)
    now, base = hacking.signs(images, [4, 8, 4]), hacking.signs(images / 2, [4, 8])
    assert now.keys() == {"saturation", "contrast", "diversity", "grid_energy_4", "grid_energy_8"}
    found = hacking.relative(now, base)
    np.testing.assert_allclose(
        [found["contrast"], found["diversity"], found["saturation"]], [2, 2, 1], rtol=1e-4
    )
    assert hacking.relative({"a": 0.0}, {"a": 0.0}) == {"a": 1.0}
