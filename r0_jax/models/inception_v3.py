"""Inception v3 as FID has it: the network of 2015 that TensorFlow's FID reads, in torch's names.

The layout is torchvision's `inception.py`. As in the published FID, average pools leave the border
out of their count, and the last block's pool takes the maximum. The head is left out.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from r0_jax.models.linear import Conv

_EPS = 1e-3
WIDTH = 2048  # of the features
SIDE = 299  # pixels of the images that FID's features are of

Images = Float[Array, "b _h _w _c"]


class BatchNorm(nnx.Module):
    """Normalize by means and variances that the file holds."""

    def __init__(self, width: int):
        self.scale, self.bias = (nnx.Param(f(width)) for f in (jnp.ones, jnp.zeros))
        self.running_mean, self.running_var = (nnx.Param(f(width)) for f in (jnp.zeros, jnp.ones))

    def __call__(self, x: Images) -> Images:
        scale = self.scale.get_value() * lax.rsqrt(self.running_var.get_value() + _EPS)
        shift = self.bias.get_value() - self.running_mean.get_value() * scale
        return x * scale[None, None, None] + shift[None, None, None]


class BasicConv2d(nnx.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        pad: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            inputs,
            outputs,
            kernel_size=kernel,
            strides=stride,
            padding=[(k // 2, k // 2) if pad else (0, 0) for k in kernel],
            use_bias=False,
            rngs=rngs,
        )
        self.bn = BatchNorm(outputs)

    def __call__(self, x: Images) -> Images:
        return jax.nn.relu(self.bn(self.conv(x)))


class Mixed(nnx.Module):
    """Join what branches of convolutions, and a pool, see of the same images.

    A branch is its name before the number of each convolution, and their (outputs, kernel) in
    order; a plain name is a branch of one. The pool's branch may lead through a 1 x 1 convolution.
    """

    def __init__(
        self,
        inputs: int,
        branches: dict[str, list[tuple[str, int, tuple[int, int]]]],
        pooled: int = 0,
        *,
        reduce: bool = False,
        largest: bool = False,
        rngs: nnx.Rngs,
    ):
        self.reduce, self.largest = reduce, largest
        self.branches = tuple(tuple(name for name, *_ in found) for found in branches.values())
        for found in branches.values():
            width = inputs
            for i, (name, outputs, kernel) in enumerate(found):
                shrinks = reduce and i == len(found) - 1
                conv = BasicConv2d(
                    width, outputs, kernel, 2 if shrinks else 1, pad=not shrinks, rngs=rngs
                )
                setattr(self, name, conv)
                width = outputs
        if pooled:
            self.branch_pool = BasicConv2d(inputs, pooled, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        seen = []
        for names in self.branches:
            y = x
            for name in names:
                y = getattr(self, name)(y)
            seen.append(y)
        if self.reduce:
            return jnp.concatenate([*seen, max_pool(x, 2, 0)], axis=-1)
        pool = max_pool(x, 1, 1) if self.largest else average_pool(x)
        return jnp.concatenate([*seen, self.branch_pool(pool)], axis=-1)


class Split(nnx.Module):
    """The last blocks: two of their branches end in two convolutions side by side."""

    def __init__(self, inputs: int, *, largest: bool, rngs: nnx.Rngs):
        self.largest = largest
        self.branch1x1 = BasicConv2d(inputs, 320, rngs=rngs)
        self.branch3x3_1 = BasicConv2d(inputs, 384, rngs=rngs)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), pad=True, rngs=rngs)
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), pad=True, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, (3, 3), pad=True, rngs=rngs)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), pad=True, rngs=rngs)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), pad=True, rngs=rngs)
        self.branch_pool = BasicConv2d(inputs, 192, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pool = max_pool(x, 1, 1) if self.largest else average_pool(x)
        seen = [
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pool),
        ]
        return jnp.concatenate(seen, axis=-1)


def _a(inputs: int, pooled: int, rngs: nnx.Rngs) -> Mixed:
    branches = {
        "1x1": [("branch1x1", 64, (1, 1))],
        "5x5": [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        "3x3dbl": [
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ],
    }
    return Mixed(inputs, branches, pooled, rngs=rngs)


def _b(inputs: int, rngs: nnx.Rngs) -> Mixed:
    branches = {
        "3x3": [("branch3x3", 384, (3, 3))],
        "3x3dbl": [
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ],
    }
    return Mixed(inputs, branches, reduce=True, rngs=rngs)


def _c(width: int, rngs: nnx.Rngs) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches = {
        "1x1": [("branch1x1", 192, (1, 1))],
        "7x7": [
            ("branch7x7_1", width, (1, 1)),
            ("branch7x7_2", width, row),
            ("branch7x7_3", 192, column),
        ],
        "7x7dbl": [
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ],
    }
    return Mixed(768, branches, 192, rngs=rngs)


def _d(inputs: int, rngs: nnx.Rngs) -> Mixed:
    branches = {
        "3x3": [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))],
        "7x7x3": [
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3)),
        ],
    }
    return Mixed(inputs, branches, reduce=True, rngs=rngs)


def max_pool(x: Images, stride: int, pad: int) -> Images:
    """Return the maximum of windows of 3 x 3."""
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    padding = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    return lax.reduce_window(x, -math.inf, lax.max, window, strides, padding)


def average_pool(x: Images) -> Images:
    """Return the mean of windows of 3 x 3 around each pixel, of those that are in the image."""

    def total(of: jax.Array) -> jax.Array:
        return lax.reduce_window(of, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


class InceptionV3(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.config = None  # there is one
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, (3, 3), 2, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3), rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, (3, 3), pad=True, rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3), rngs=rngs)
        self.Mixed_5b = _a(192, 32, rngs)
        self.Mixed_5c = _a(256, 64, rngs)
        self.Mixed_5d = _a(288, 64, rngs)
        self.Mixed_6a = _b(288, rngs)
        self.Mixed_6b = _c(128, rngs)
        self.Mixed_6c = _c(160, rngs)
        self.Mixed_6d = _c(160, rngs)
        self.Mixed_6e = _c(192, rngs)
        self.Mixed_7a = _d(768, rngs)
        self.Mixed_7b = Split(1280, largest=False, rngs=rngs)
        self.Mixed_7c = Split(2048, largest=True, rngs=rngs)

    def image_features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Return the mean of the last block over the image: "pool3". Images are about -1 to 1."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x, 2, 0)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool(x, 2, 0))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return jnp.mean(x, axis=(1, 2))
