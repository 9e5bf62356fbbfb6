import numpy as np
import pytest
from torch_preprocess import noise

from r0_jax.errors import InputError
from r0_jax.evaluation import hacking

GREY = np.full((3, 32, 48, 3), 0.5, np.float32)


def sign(name, images, *grids):
    return look(images, grids)[name]


def look(images, grids):
    return hacking.signs(np.asarray(hacking.look(images, grids)), grids)


def test_saturation():
    assert sign("saturation", GREY) == 0
    pure = np.zeros_like(GREY)
    pure[..., 1] = 0.4
    np.testing.assert_allclose(sign("saturation", pure), 1)
    np.testing.assert_allclose(sign("saturation", (GREY + pure) / 2), 0.2 / 0.45, rtol=1e-6)


def halves():
    images = GREY.copy()
    images[:, :16], images[:, 16:] = 0, 1
    return images


def test_contrast():
    assert sign("contrast", GREY) < 1e-6
    np.testing.assert_allclose(sign("contrast", halves()), 0.5, rtol=1e-5)


def test_edges_darkness_and_colours():
    assert sign("edges", GREY) == sign("dark", GREY) == sign("colour_entropy", GREY) == 0
    np.testing.assert_allclose(sign("edges", halves()), 1 / 31 / 2, rtol=1e-5)
    np.testing.assert_allclose(sign("dark", halves()), 0.5, rtol=1e-5)
    np.testing.assert_allclose(sign("colour_entropy", halves()), 1, rtol=1e-5)
    three = GREY.copy()
    three[0, ..., 0], three[:, 8:, :, 1] = 0.9, 0.1  # four colours: two images of two, 1 : 3
    entropy = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    np.testing.assert_allclose(sign("colour_entropy", three), entropy, rtol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_energy_on_the_grid_of_patches(axis):
    n = GREY.shape[axis]
    wave = np.cos(2 * np.pi * 4 * np.arange(n) / n).reshape(
        [-1 if i == axis else 1 for i in range(4)]
    )
    striped = (GREY + 0.2 * wave).astype(np.float32)
    assert sign("grid_energy_4", GREY, 4) == 0
    np.testing.assert_allclose(sign("grid_energy_4", striped, 2, 4), 1, rtol=1e-5)
    np.testing.assert_allclose(sign("grid_energy_2", striped, 2, 4), 1, rtol=1e-5)  # a harmonic
    assert sign("grid_energy_3", striped, 3) < 1e-6
    assert 0 < sign("grid_energy_4", noise(32, 32), 4) < 0.4


def test_diversity():
    assert sign("diversity", GREY) < 1e-6
    images = noise(32, 48)
    small = images.reshape(2, 8, 4, 8, 6, 3).mean((2, 4))
    expected = np.linalg.norm(small[0] - small[1])
    np.testing.assert_allclose(sign("diversity", images), expected, rtol=1e-5)
    assert sign("diversity", noise(5, 7)) > 0  # smaller than a thumbnail


def test_signs_of_parts_are_joined_as_signs_of_the_whole():
    images, grids = noise(32, 32), (4, 8)
    parts = [hacking.look(images[i : i + 1], grids) for i in range(len(images))]
    whole, joined = look(images, grids), hacking.signs(np.concatenate(parts), grids)
    assert joined == pytest.approx(whole, rel=1e-5)


def test_signs_are_multiples_of_the_bases():
    images, grids = noise(32, 32), (4, 8)
    now, base = look(images, grids), look(images / 2, grids)
    assert {"saturation", "contrast", "diversity", "grid_energy_4", "grid_energy_8"} < now.keys()
    found = hacking.relative(now, base)
    np.testing.assert_allclose(
        [found["contrast"], found["diversity"], found["saturation"]], [2, 2, 1], rtol=1e-4
    )
    assert hacking.relative({"a": 0.0}, {"a": 0.0}) == {"a": 1.0}


def test_what_is_outside_of_its_bounds():
    bounds = {"contrast": (0.5, 1.5), "dark": (0.0, 4.0), "grid_energy_7": (0, 2)}
    hacking.check_bounds(bounds, [7])
    now = {"contrast": 1.6, "dark": 4.0, "grid_energy_7": 0.1, "edges": 9.0}
    assert hacking.outside(now, bounds) == {"contrast": 1.6}
    assert hacking.outside(now | {"contrast": 1.5}, bounds) == {}


@pytest.mark.parametrize(
    "bounds",
    [{"contrasts": (0.5, 1.5)}, {"grid_energy_8": (0, 1)}, {"dark": 2.0}, {"dark": (2, 1)},
     {"dark": (0, float("nan"))}, {"dark": ("a", "b")}, {"dark": (0, 1, 2)}],
)  # fmt: skip
def test_bounds_that_are_none(bounds):
    with pytest.raises(InputError, match=f"veto.{next(iter(bounds))}"):
        hacking.check_bounds(bounds, [7])
