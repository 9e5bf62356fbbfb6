"""Differentiable preprocessing: turns images in [0, 1] into the input of a vision tower."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from r0_jax.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# A resize that averages blocks first leaves at least this factor to bicubic. PIL's `thumbnail`
# leaves 2 as well; `Image.resize` calls it `reducing_gap`.
_GAP = 2
_FACTOR = 28  # pixels a side of one token of Qwen2-VL
RESIZES = ("bicubic", "reduce")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """An antialiased bicubic resize (as PIL's), mostly to a square, then normalization.

    Attributes:
      size: side of the square output, in pixels.
      policy: how an image becomes square. "crop" resizes the shortest side to `size` and crops
        the centre (CLIP, PickScore). "pad" resizes the longest side and adds black borders (HPS).
        "squash" resizes both sides (Chinese-CLIP). "area" keeps the shape: about size^2 pixels,
        with sides that are multiples of 28 (Qwen2-VL).
      corner: how a crop rounds a half pixel of its corner: "floor" as in transformers, or "round"
        (half to even) as in torchvision's CenterCrop.
      resize: "bicubic" resizes in one step, as published. "reduce" first averages square blocks
        of pixels that divide the image, and leaves bicubic a factor of at least 2.
    """

    size: int
    policy: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    corner: str = "floor"
    resize: str = "bicubic"

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 3"]:
        """Return normalized images. Keep bicubic overshoot: clipping it would kill gradients."""
        b, h, w, c = images.shape
        height, width = self._resized(h, w)
        if self.resize == "reduce":
            images = _block_means(images, min(h // (_GAP * height), w // (_GAP * width)))
        if (height, width) != images.shape[1:3]:
            images = jax.image.resize(images, (b, height, width, c), "cubic", antialias=True)
        if self.policy == "crop":
            top, left = self._corner(height), self._corner(width)
            images = images[:, top : top + self.size, left : left + self.size]
        elif self.policy == "pad":
            top, left = (self.size - height) // 2, (self.size - width) // 2
            images = jnp.pad(
                images,
                ((0, 0), (top, self.size - height - top), (left, self.size - width - left), (0, 0)),
            )
        mean, std = (np.asarray(x, np.float32).reshape(1, 1, 1, -1) for x in (self.mean, self.std))
        return (images - mean) / std

    def on_host(
        self, image: Float[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w 3"]
    ) -> Float[np.ndarray, "h2 w2 3"]:
        """Do the same with one image of any size, in numpy: float32 in [0, 1], or uint8.

        It compiles nothing, and holds little more than the image: of a crop it computes only what
        is kept, however long and thin the image is.
        """
        h, w, _ = image.shape
        height, width = self._resized(h, w)
        if self.resize == "reduce":
            most = min(h // (_GAP * height), w // (_GAP * width))
            if most > 1:
                image = _block_means(_unit(image)[None], most)[0]
        starts, kept = (0, 0), (height, width)
        if self.policy == "crop":
            starts = self._corner(height), self._corner(width)
            kept = min(height, self.size), min(width, self.size)
        if height != image.shape[0]:
            image = _resize_rows(image, height, starts[0], kept[0])
        else:
            image = _unit(image[starts[0] : starts[0] + kept[0]])
        if width != image.shape[1]:
            turned = _resize_rows(image.swapaxes(0, 1), width, starts[1], kept[1])
            image = turned.swapaxes(0, 1)
        else:
            image = image[:, starts[1] : starts[1] + kept[1]]
        if self.policy == "pad":
            top, left = (self.size - height) // 2, (self.size - width) // 2
            rest = ((top, self.size - height - top), (left, self.size - width - left), (0, 0))
            image = np.pad(image, rest)
        return (image - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _resized(self, h: int, w: int) -> tuple[int, int]:
        """Return height and width after the resize, before the crop or the borders."""
        match self.policy:
            case "crop":  # transformers and torchvision round down
                return int(self.size * h / min(h, w)), int(self.size * w / min(h, w))
            case "pad":  # HPS rounds to the nearest
                longest = max(h, w)
                return tuple(max(1, round(n * (self.size / longest))) for n in (h, w))
            case "area":
                return smart_resize(h, w, self.size**2)
            case _:
                return self.size, self.size

    def _corner(self, length: int) -> int:
        """Return where the centre crop of a side begins."""
        rest = length - self.size
        return rest // 2 if self.corner == "floor" else round(rest / 2)


def smart_resize(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Return sides that are multiples of 28 and nearly keep the shape, for `pixels` pixels or less.

    It is `smart_resize` of qwen_vl_utils where the least and the most number of pixels are equal,
    as HPSv3 sets them. Rounding errors are part of it: of 448^2 pixels an image of 512 px gets 448,
    but one of 768 or 1536 px gets 420, since 15.999999999999998 is rounded down. Raise InputError
    for an image whose one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise InputError(
            f"an image of {height} x {width} pixels (height x width) cannot be scored: one side is "
            "over 200 times the other"
        )
    sides = [max(_FACTOR, round(n / _FACTOR) * _FACTOR) for n in (height, width)]
    if math.prod(sides) > pixels:
        shrink = math.sqrt(height * width / pixels)
        sides = [max(_FACTOR, math.floor(n / shrink / _FACTOR) * _FACTOR) for n in (height, width)]
    elif math.prod(sides) < pixels:
        grow = math.sqrt(pixels / (height * width))
        sides = [math.ceil(n * grow / _FACTOR) * _FACTOR for n in (height, width)]
    return sides[0], sides[1]


def _unit(image: np.ndarray) -> Float[np.ndarray, "..."]:
    """Return pixels in [0, 1], float32."""
    return image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image


def _resize_rows(
    image: np.ndarray, height: int, first: int, count: int
) -> Float[np.ndarray, "n w 3"]:
    """Return rows `first` to `first + count` of the image resized to `height` rows.

    It is jax.image.resize's "cubic" with antialias (Keys' kernel, a = -1/2), one row after the
    other: a matrix of all weights would be larger than the image.
    """
    ratio = len(image) / height
    stretch = max(ratio, 1.0)
    rows = np.empty((count, *image.shape[1:]), np.float32)
    for i in range(count):
        centre = (first + i + 0.5) * ratio - 0.5
        low = max(0, math.ceil(centre - 2 * stretch))
        high = min(len(image), math.floor(centre + 2 * stretch) + 1)
        weights = _cubic(np.abs(np.arange(low, high) - centre) / stretch)
        weights = (weights / weights.sum()).astype(np.float32)
        rows[i] = np.tensordot(weights, _unit(image[low:high]), 1)
    return rows


def _cubic(x: np.ndarray) -> np.ndarray:
    near = ((1.5 * x - 2.5) * x) * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _block_means(
    images: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"], most: int
) -> Float[Array, "b h2 w2 c"] | Float[np.ndarray, "b h2 w2 c"]:
    """Average the largest square blocks that divide the image, at most `most` pixels a side."""
    b, h, w, c = images.shape
    side = max((n for n in range(1, most + 1) if h % n == w % n == 0), default=1)
    return images.reshape(b, h // side, side, w // side, side, c).mean(axis=(2, 4))


# Steps of a transformers processor that every reward here needs.
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_RESCALED = 1 / 255
_BICUBIC = 3  # PIL's number


def from_json(
    fields: Mapping[str, Any], image_size: int, file: str = "preprocessor_config.json"
) -> Preprocess:
    """Read the preprocessing from the `fields` of a transformers file; null means CLIP's value.

    Messages call the file `file`. Raise InputError for a resampling other than bicubic, a
    switched-off step, a size that differs from the tower's, and an invalid mean or deviation.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    expected = {"resample": _BICUBIC, "rescale_factor": _RESCALED, **dict.fromkeys(_STEPS, True)}
    for name, value in expected.items():
        if (found := fields.get(name, value)) != value:
            raise InputError(
                f"{file}: {name} = {json.dumps(found)} is not supported (supported: "
                f"{json.dumps(value)}{', bicubic' * (name == 'resample')})"
            )
    crops = fields.get("do_center_crop", True)
    for field in ("size", "crop_size") if crops else ("size",):
        size = fields.get(field, image_size)
        sizes = size.values() if isinstance(size, Mapping) else [size]
        if any(side not in (None, image_size) for side in sizes):
            raise InputError(
                f"{file}: {field} = {size}, but the tower takes {image_size} px: set that number"
            )
    size = fields.get("size")
    squashes = not crops or (isinstance(size, Mapping) and size.get("height") is not None)
    return Preprocess(
        image_size,
        "squash" if squashes else "crop",
        _channels(fields, "image_mean", CLIP_MEAN, file),
        _channels(fields, "image_std", CLIP_STD, file, above=0.0),
    )


def _channels(
    fields: Mapping[str, Any],
    name: str,
    default: tuple[float, ...],
    where: str,
    above: float = -math.inf,
) -> tuple[float, ...]:
    value = fields.get(name, default)
    numbers = (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(x, int | float) and above < x < math.inf for x in value)
    )
    if not numbers:
        least = "" if above == -math.inf else f" above {above:g}"
        raise InputError(
            f"{where}: {name} = {json.dumps(value)} is not supported: give three numbers"
            f"{least}, one per channel"
        )
    return tuple(map(float, value))


def from_qwen2_vl(fields: Mapping[str, Any], size: int, resize: str) -> Preprocess:
    """Read mean and deviation from the `fields` of a Qwen2-VL's `preprocessor_config.json`.

    An image becomes about `size`^2 pixels, in place of the file's range. Raise InputError for a
    resampling other than bicubic, a switched-off step, and an invalid mean or deviation.
    """
    kept = ("resample", "rescale_factor", "image_mean", "image_std", *_STEPS)
    own = from_json({name: fields[name] for name in kept if name in fields}, size)
    return dataclasses.replace(own, policy="area", resize=resize)


_RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}


def from_open_clip(fields: Mapping[str, Any], image_size: int) -> Preprocess:
    """Read the `preprocess_cfg` of an `open_clip_config.json`; null means open_clip's default.

    Raise InputError for an unsupported interpolation, padding or colour mode, and for an invalid
    mean or deviation.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    only = {
        "interpolation": ("bicubic",),
        "mode": ("RGB",),
        "fill_color": (0,),
        "resize_mode": tuple(_RESIZE_MODES),
        "size": (image_size, [image_size, image_size], [3, image_size, image_size]),
    }
    for name, value in fields.items():
        if name in only and value not in only[name]:
            raise InputError(
                f"preprocess_cfg: {name} = {value!r} is not supported (supported: "
                f"{', '.join(map(str, only[name]))})"
            )
    return Preprocess(
        image_size,
        _RESIZE_MODES[fields.get("resize_mode", "shortest")],
        _channels(fields, "mean", CLIP_MEAN, "preprocess_cfg"),
        _channels(fields, "std", CLIP_STD, "preprocess_cfg", above=0.0),
        corner="round",
    )
