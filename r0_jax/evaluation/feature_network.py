"""Loads what sees images for distances between sets of them: a CLIP, DINOv2 or Inception v3."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from r0_jax import remote
from r0_jax.files import naming, read_json
from r0_jax.models import inception_v3
from r0_jax.models.dinov2 import Dinov2Config, Dinov2Model
from r0_jax.models.inception_v3 import InceptionV3
from r0_jax.rewards import tower
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, stored_in

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINOV2_SIDE = 224  # pixels, of the published distances
_HALF = (128 / 255,) * 3  # FID's networks read (pixel - 128) / 128
FID_RESIZES = ("clean", "legacy")

CLIP, DINOV2, INCEPTION = "clip", "dinov2", "inception_v3"


class FeatureNetwork(NamedTuple):
    """What sees images.

    Attributes:
      kind: "clip", whose features have unit length, "dinov2" or "inception_v3".
      network: has the method `image_features`.
      params: `Lazy` weights of that network.
      prepare: images in [0, 1] -> its input.
      width: of its features.
      dtype: of its input.
      frechet: name of its Frechet distance in tables.
    """

    kind: str
    network: Network
    params: Params
    prepare: Preprocess
    width: int
    dtype: str
    frechet: str

    def __call__(self, params: Params, prepared: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Return the features of prepared images, float32."""
        found = self.network.apply(params, "image_features", prepared.astype(self.dtype))
        return tower.normalize(found) if self.kind == CLIP else found.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TensorFlowResize(Preprocess):
    """The resize of TensorFlow 1 to a square: of four neighbours, however much it shrinks.

    It counts pixels by their corner, not by their centre. The first FIDs were made with it.
    """

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 3"]:
        return jnp.stack([jnp.asarray(self.on_host(np.asarray(image))) for image in images])

    def on_host(
        self, image: Float[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w 3"]
    ) -> Float[np.ndarray, "h2 w2 3"]:
        pixels = image.astype(np.float32)
        if image.dtype == np.uint8:
            pixels /= 255
        for axis in (0, 1):
            length = pixels.shape[axis]
            at = np.arange(self.size, dtype=np.float32) * np.float32(length / self.size)
            below = np.floor(at).astype(int)
            above = np.minimum(below + 1, length - 1)
            part = (at - below).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            first, second = np.take(pixels, below, axis), np.take(pixels, above, axis)
            pixels = first + (second - first) * part
        return (pixels - np.float32(self.mean[0])) / np.float32(self.std[0])


def load(folder: str | Path, dtype: str = "float32", fid_resize: str = "clean") -> FeatureNetwork:
    """Load a folder of transformers or open_clip, or one that `convert_reward` made of Inception.

    Whole images are brought to a square. `fid_resize` is of Inception: "clean" shrinks as clean-fid
    does, "legacy" as TensorFlow 1. Raise InputError for a folder of another kind.
    """
    folder = remote.local(folder)
    path = folder / "config.json"
    kind = read_json(path).get("model_type") if path.is_file() else None
    if kind == INCEPTION:
        resize = Preprocess if fid_resize == "clean" else TensorFlowResize
        prepare = resize(inception_v3.SIDE, policy="squash", mean=_HALF, std=_HALF)
        network = Network.abstract(lambda rngs: InceptionV3(rngs=rngs))
        width, frechet = inception_v3.WIDTH, f"fid_{fid_resize}"
    elif kind == DINOV2:
        files = convert.find_files(folder, "model")
        with naming(path):
            config = Dinov2Config.from_json(read_json(path))
            network = Network.abstract(
                lambda rngs: Dinov2Model(config, rngs=rngs), stored_in(files)
            )
        side = _DINOV2_SIDE // config.patch_size * config.patch_size or config.patch_size
        prepare = Preprocess(side, policy="squash", mean=IMAGENET_MEAN, std=IMAGENET_STD)
        width, frechet = config.hidden_size, "frechet_dinov2"
    else:
        found = tower.load(folder, dtype, text=False)
        seen = {name: found.params[name] for name in found.sight.shapes}
        prepare = dataclasses.replace(found.prepare, policy="squash")
        return FeatureNetwork(CLIP, found.sight, seen, prepare, found.width, dtype, "frechet_clip")
    params = convert.open_params(convert.find_files(folder, "model"), network, dtype)
    return FeatureNetwork(kind, network, params, prepare, width, dtype, frechet)
