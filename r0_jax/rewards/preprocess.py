"""Images in [0, 1] -> what a vision tower was trained on, differentiably."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r0_jax.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# Of a resize that begins with means of blocks, the part left to bicubic: PIL's `thumbnail` too
# leaves a factor of 2, and its `Image.resize` calls it `reducing_gap`.
_GAP = 2
RESIZES = ("bicubic", "reduce")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Bicubic resize with antialiasing (PIL's), then the policy for what is not square.

    Attributes:
      size: of the square that comes out, in pixels.
      policy: "crop" (shortest side to `size`, centre crop: CLIP, PickScore), "pad" (longest side,
        black borders: HPS) or "squash" (both sides: Chinese-CLIP).
      corner: of a crop, where the middle lies between two pixels: "floor" as the processors of
        transformers have it, or "round" (half to even) as torchvision's CenterCrop.
      resize: "bicubic", all at once, as published; "reduce": means of whole blocks of pixels
        first, as far as blocks divide the image and leave bicubic a factor of 2.
    """

    size: int
    policy: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    corner: str = "floor"
    resize: str = "bicubic"

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """Normalized images. Bicubic overshoot is kept: clipping it would kill gradients."""
        b, h, w, c = images.shape
        match self.policy:
            case "crop":  # transformers and torchvision cut the fraction of a pixel off
                height, width = (int(self.size * n / min(h, w)) for n in (h, w))
            case "pad":  # HPS rounds it
                height, width = (max(1, round(n * (self.size / max(h, w)))) for n in (h, w))
            case _:
                height, width = self.size, self.size
        if self.resize == "reduce":
            images = _block_means(images, min(h // (_GAP * height), w // (_GAP * width)))
        if (height, width) != images.shape[1:3]:
            images = jax.image.resize(images, (b, height, width, c), "cubic", antialias=True)
        if self.policy == "crop":
            halve = {"floor": lambda n: n // 2, "round": lambda n: round(n / 2)}[self.corner]
            top, left = halve(height - self.size), halve(width - self.size)
            images = images[:, top : top + self.size, left : left + self.size]
        elif self.policy == "pad":
            top, left = (self.size - height) // 2, (self.size - width) // 2
            images = jnp.pad(
                images,
                ((0, 0), (top, self.size - height - top), (left, self.size - width - left), (0, 0)),
            )
        mean, std = (np.asarray(x, np.float32).reshape(1, 1, 1, -1) for x in (self.mean, self.std))
        return (images - mean) / std


def _block_means(images: Float[Array, "b h w c"], most: int) -> Float[Array, "b h2 w2 c"]:
    """Means of the largest square blocks, at most `most` pixels a side, that divide the image."""
    b, h, w, c = images.shape
    side = max((n for n in range(1, most + 1) if h % n == w % n == 0), default=1)
    return images.reshape(b, h // side, side, w // side, side, c).mean(axis=(2, 4))


# Of the steps of a processor of transformers, what every one here does.
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_RESCALED = 1 / 255
_BICUBIC = 3  # of PIL


def from_json(
    fields: Mapping[str, Any], image_size: int, file: str = "preprocessor_config.json"
) -> Preprocess:
    """The preprocessing that transformers publishes in `file`, as messages call it; what is null is
    CLIP's.

    Raises InputError for a resampling other than bicubic, for a step that is left out, for a size
    that the tower does not take and for a mean or deviation that is none.
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
                f"{file}: {field} = {size}, but the tower takes {image_size} px: write that number"
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
            f"{where}: {name} = {json.dumps(value)} is not supported: three numbers"
            f"{least} are expected, one a channel"
        )
    return tuple(map(float, value))


_RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}


def from_open_clip(fields: Mapping[str, Any], image_size: int) -> Preprocess:
    """The preprocessing that the `preprocess_cfg` of an `open_clip_config.json` describes; as
    there, null is what is usual.

    Raises InputError for another interpolation, padding or colour mode, and for a mean or deviation
    that is none.
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
