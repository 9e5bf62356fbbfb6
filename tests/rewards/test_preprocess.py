import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch_preprocess import SIZE, in_torch, noise
from transformers import CLIPImageProcessor

from benchmarks.preprocess import difference
from r0_jax.errors import InputError
from r0_jax.rewards import preprocess
from r0_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from r0_jax.rewards.reward import value_and_gradient

# Square, wide and tall; larger and smaller than the tower; the same; and 40 * 16 / 23 = 27.8,
# where cutting off and rounding differ.
SHAPES = [(48, 48), (9, 9), (16, 16), (40, 23), (23, 40), (10, 25), (33, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(
    ("policy", "corner"),
    [("crop", "floor"), ("crop", "round"), ("pad", "floor"), ("squash", "floor")],
)
def test_equals_torch_forward_and_gradient(shape, policy, corner):
    images, weights = noise(*shape), noise(SIZE, SIZE, 1)
    there = torch.tensor(images, requires_grad=True)
    expected = in_torch(there, policy, corner)
    (expected * torch.as_tensor(weights)).sum().backward()

    prepare = Preprocess(SIZE, policy, corner=corner)
    found, pullback = jax.vjp(prepare, jnp.asarray(images))
    assert found.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(pullback(jnp.asarray(weights))[0], there.grad, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(64, 64), (48, 71), (71, 48), (9, 14)], ids="{0[0]}x{0[1]}".format
)
def test_equals_the_processor_of_transformers_on_uint8(shape):
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    prepare = preprocess.from_json(processor.to_dict(), SIZE)

    def difference(images):
        theirs = processor([Image.fromarray(i) for i in images], return_tensors="np").pixel_values
        ours = prepare(jnp.asarray(images / np.float32(255)))
        return np.abs(np.moveaxis(theirs, 1, -1) - ours).max() * min(CLIP_STD)

    # It rounds to 1/255 twice: after the horizontal and the vertical pass.
    grey = (64 + 128 * noise(*shape)).astype(np.uint8)
    assert difference(grey) < 2 / 255
    # Bicubic overshoots, which uint8 clips and a differentiable path must not.
    assert difference((noise(*shape) > 0.5).astype(np.uint8) * 255) > 4 / 255


def test_a_processor_that_is_given_both_sides_squashes_before_it_crops():
    processor = CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, crop_size=SIZE)
    prepare = preprocess.from_json(processor.to_dict(), SIZE)
    image = (64 + 128 * noise(24, 40)[0]).astype(np.uint8)
    theirs = processor(Image.fromarray(image), return_tensors="np").pixel_values
    ours = prepare(jnp.asarray(image[None] / np.float32(255)))
    assert np.abs(np.moveaxis(theirs, 1, -1) - ours).max() * min(CLIP_STD) < 2 / 255


@pytest.mark.parametrize(
    "shape", [(48, 48), (64, 48), (48, 64), (91, 48), (9, 9)], ids="{0[0]}x{0[1]}".format
)
@pytest.mark.parametrize(
    ("policy", "corner"),
    [("crop", "round"), ("crop", "floor"), ("pad", "floor"), ("squash", "floor")],
)
def test_equals_the_published_path_through_pil_but_for_rounding_and_clipping(shape, policy, corner):
    prepare = Preprocess(SIZE, policy, corner=corner)
    grey = (64 + 128 * noise(*shape)[0]).astype(np.uint8)
    assert difference(grey, prepare).max() < 2
    black_and_white = (noise(*shape)[0] > 0.5).astype(np.uint8) * 255
    assert difference(black_and_white, prepare).max() < 70


def test_the_corner_of_a_crop_with_an_odd_margin():
    # 16 x 19: floor(1.5) = 1, and half to even is 2, as torchvision has it.
    image = jnp.broadcast_to(jnp.arange(19.0)[None, None, :, None], (1, 16, 19, 3))
    for corner, first in (("floor", 1), ("round", 2)):
        prepare = Preprocess(16, mean=(0.0,) * 3, std=(1.0,) * 3, corner=corner)
        assert prepare(image)[0, 0, 0, 0] == first


def test_reducing_is_pils_reduce_then_bicubic():
    images = noise(96, 72)
    prepare = Preprocess(SIZE, "squash", resize="reduce")
    # 2 x 2: blocks of 3 would leave 24 px, less than twice the size.
    blocks = images.reshape(2, 48, 2, 36, 2, 3).mean((2, 4))
    plain = Preprocess(SIZE, "squash")
    np.testing.assert_allclose(prepare(jnp.asarray(images)), plain(jnp.asarray(blocks)), atol=1e-5)
    # What no whole block divides, or is less than four times as large, is not reduced.
    for shape in ((67, 71), (60, 60)):
        images = jnp.asarray(noise(*shape))
        np.testing.assert_array_equal(prepare(images), plain(images))


def test_reducing_keeps_a_gradient_at_every_pixel():
    _, pullback = jax.vjp(Preprocess(SIZE, resize="reduce"), jnp.asarray(noise(64, 64)))
    assert jnp.all(pullback(jnp.asarray(noise(SIZE, SIZE, 1)))[0] != 0)


def test_a_line_of_pixels_is_still_an_image():
    assert Preprocess(SIZE, "pad")(jnp.asarray(noise(2, 90))).shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize("policies", [("crop",) * 3, ("crop", "pad", "squash")])
def test_rewards_in_one_program_share_the_resize_of_a_square_image(policies):
    """XLA merges them; the gradients stay apart, as their normalization needs."""

    def flops(policies):
        def score(number, policy, images):
            return jnp.sin(number + Preprocess(SIZE, policy)(images)).sum((1, 2, 3))

        def gradients(images):
            return [
                value_and_gradient(functools.partial(score, *chosen), images)
                for chosen in enumerate(policies)
            ]

        images = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
        return jax.jit(gradients).lower(images).compile().cost_analysis()["flops"]

    one, three = flops(policies[:1]), flops(policies)
    np.testing.assert_allclose(three, (1 + 3) / (1 + 1) * one, rtol=0.05)


def test_overshoot_keeps_its_gradient():
    stripes = jnp.broadcast_to(jnp.arange(9)[None, :, None, None] % 3 == 0, (1, 9, 9, 3))
    prepare = Preprocess(SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    larger, pullback = jax.vjp(prepare, stripes.astype(jnp.float32))
    assert larger.min() < -0.01
    at_overshoot = pullback((larger < -0.01).astype(jnp.float32))[0]
    assert jnp.abs(at_overshoot).max() > 0.1


def test_reads_published_files():
    openai = {
        "crop_size": 224,
        "size": 224,
        "do_center_crop": True,
        "resample": 3,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    assert preprocess.from_json(openai, 224) == Preprocess(224)
    newer = openai | {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
    assert preprocess.from_json(newer, 224) == Preprocess(224)
    chinese = {"do_center_crop": False, "size": {"height": 224, "width": 224}, "crop_size": 99}
    assert preprocess.from_json(chinese, 224) == Preprocess(224, "squash")
    assert preprocess.from_json({}, 224) == Preprocess(224)
    nulls = dict.fromkeys([*openai, "do_resize", "do_rescale", "do_normalize", "rescale_factor"])
    assert preprocess.from_json(nulls, 224) == Preprocess(224)
    siglip = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    found = preprocess.from_json(siglip, 8)(jnp.ones((1, 8, 8, 3)))
    np.testing.assert_allclose(found, 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resample": 2}, r"resample = 2 is not supported \(supported: 3, bicubic\)"),
        ({"do_resize": False}, r"do_resize = false is not supported \(supported: true\)"),
        ({"do_rescale": False}, "do_rescale = false is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.00784.* is not supported"),
        ({"do_normalize": False}, "do_normalize = false is not supported"),
        ({"image_std": [0, 0, 0]}, r"image_std = \[0, 0, 0\] is not supported: give three numb"),
        (
            {"image_std": [0.5, -0.5, 0.5]},
            "image_std = .* give three numbers above 0, one per channel",
        ),
        (
            {"image_mean": 0.5},
            "image_mean = 0.5 is not supported: give three numbers, one per",
        ),
        ({"image_mean": ["a", "b", "c"]}, 'image_mean = ."a", "b", "c". is not supported'),
        ({"image_mean": "abc"}, 'image_mean = "abc" is not supported'),
        ({"image_mean": [0.5, 0.5]}, r"image_mean = \[0.5, 0.5\] is not supported"),
        ({"image_mean": [0.5, 0.5, math.nan]}, "image_mean = .*NaN. is not supported"),
        ({"size": [224, 224]}, r"size = \[224, 224\], but the tower takes 224 px: set that"),
        ({"size": {"height": [224]}}, "size = .*, but the tower takes 224 px"),
        ({"crop_size": 336}, "crop_size = 336, but the tower takes 224 px"),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, "size = {'shortest_edge': 256}, but"),
        ({"crop_size": {"height": 224, "width": 448}}, "crop_size = .* but the tower takes 224"),
    ],
)
def test_files_that_do_not_fit(fields, said):
    with pytest.raises(InputError, match=said):
        preprocess.from_json(fields, 224)


def test_preprocessing_of_open_clip():
    assert preprocess.from_open_clip({}, 16) == Preprocess(16, corner="round")
    fields = {
        "resize_mode": "longest",
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "size": [16, 16],
        "fill_color": 0,
    }
    assert preprocess.from_open_clip(fields, 16) == Preprocess(
        16, "pad", (0.5,) * 3, (0.25,) * 3, "round"
    )
    assert preprocess.from_open_clip(dict.fromkeys(fields), 16) == Preprocess(16, corner="round")
    for name, value in [
        ("interpolation", "bilinear"),
        ("size", 18),
        ("resize_mode", "random"),
        ("mean", 0.5),
        ("std", [0.5, 0.5, 0]),
        ("interpolation", ["bicubic"]),
    ]:
        with pytest.raises(InputError, match=f"preprocess_cfg: {name} = "):
            preprocess.from_open_clip({name: value}, 16)


@pytest.mark.parametrize("resize", ["bicubic", "reduce"])
@pytest.mark.parametrize("policy", ["crop", "pad", "squash"])
@pytest.mark.parametrize("shape", [(90, 61), (17, 20), (8, 200), (24, 24), (1, 40)])
def test_on_the_host_it_is_the_same(shape, policy, resize):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    prepare = Preprocess(24, policy, corner="round", resize=resize)
    expected = prepare(jnp.asarray(image, jnp.float32)[None] / 255)[0]
    # JAX has the places of the rows in float32, of which an error of 1e-5 is 1e-4 of an edge.
    np.testing.assert_allclose(prepare.on_host(image), expected, atol=2e-4)
    unit = image.astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(prepare.on_host(unit), expected, atol=2e-4)


def test_a_thin_image_takes_the_memory_of_its_crop():
    # Resized whole it would have 5 billion numbers.
    assert Preprocess(224).on_host(np.zeros((40_000, 1, 3), np.uint8)).shape == (224, 224, 3)
