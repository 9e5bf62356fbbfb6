"""A tiny autoencoder (TAESD) that decodes what rewards look at in training.

It is 18 times cheaper than the pipeline's own VAE. Images for people are always the VAE's.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Float

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import naming, read_json
from r0_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, stored_in

_WHICH = (
    "TAESD is for Stable Diffusion 1.x, TAESDXL for SDXL, TAESD3 for Stable Diffusion 3, TAEF1 for "
    "Z-Image"
)


@dataclasses.dataclass(frozen=True, eq=False)
class TinyDecoder:
    """A decoder from the denoising network's latents to images around [0, 1].

    Attributes:
      params: of encoder and decoder, as the file holds them; on the host.
      shift: added to the latents after the division by the config's scaling_factor. Published
        decoders are trained on scaled latents: their scaling_factor is 1, their shift 0.
    """

    network: Network
    params: Params
    shift: float

    def decode_unclipped(
        self, params: Params, latents: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2 3"]:
        """Return float32 images, computed in the dtype of `params`, in place of the VAE's."""
        latents = latents / self.network.config.scaling_factor + self.shift
        dtype = next(iter(params.values())).dtype
        images = self.network.apply(params, "decode", latents.astype(dtype))
        return images.astype(jnp.float32) / 2 + 0.5


def load(folder: str | Path, pipeline: Pipeline, dtype: str = "float32") -> TinyDecoder:
    """Read a diffusers folder of an AutoencoderTiny: config.json and its safetensors.

    Raises:
      InputError: the folder holds something else, or is for other latents than the pipeline's.
    """
    folder = remote.local(folder)
    fields = read_json(folder / "config.json")
    if fields.get("_class_name") != "AutoencoderTiny":
        raise InputError(
            f"objective.decoder={folder} is of class {fields.get('_class_name')}, not "
            f"AutoencoderTiny: {_WHICH}"
        )
    with naming(folder / "config.json"):
        config = AutoencoderTinyConfig.from_json(fields)
    height, _, channels = pipeline.latent_shape
    theirs = (channels, pipeline.image_shape[0] // height, 3)
    levels = len(config.decoder_block_out_channels) - 1
    ours = (config.latent_channels, config.upsampling_scaling_factor**levels, config.out_channels)
    for what, here, there in zip(
        ("latents of {} channels", "a pixel of latents to {0} x {0}", "images of {} channels"),
        ours,
        theirs,
        strict=True,
    ):
        if here != there:
            raise InputError(
                f"objective.decoder={folder} decodes {what.format(here)}, but the vae of "
                f"{pipeline.folder} {what.format(there)}: {_WHICH}"
            )
    files = convert.find_files(folder, "diffusion_pytorch_model")
    network = Network.abstract(lambda rngs: AutoencoderTiny(config, rngs=rngs), stored_in(files))
    params = convert.open_params(files, network, dtype)
    # The family, not the autoencoder, decides whether a shift is added.
    replaced = dataclasses.replace(pipeline, networks=pipeline.networks | {"vae": network})
    return TinyDecoder(network, params, replaced.shift)
