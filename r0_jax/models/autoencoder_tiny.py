"""TAESD, the tiny image autoencoder: diffusers `models/autoencoders/autoencoder_tiny.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.attention import Placeholder
from r0_jax.models.resnet import conv3x3


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig:
    """Mirror the fields and defaults of diffusers' `AutoencoderTiny`."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AutoencoderTinyConfig":
        """Parse a TAESD's `config.json`; raise InputError for what is not supported."""
        only = {"act_fn": ("relu",), "upsample_fn": ("nearest",)}
        # Magnitude and shift are for latents stored as bytes. Pipelines count the entries of
        # block_out_channels, which repeats the decoder's.
        unused = frozenset(
            {"latent_magnitude", "latent_shift", "force_upcast", "block_out_channels"}
        )
        config = configs.parse(cls, fields, only=only, unused=unused | configs.EMA_FIELDS)
        configs.check_least(
            config,
            1,
            "in_channels",
            "out_channels",
            "latent_channels",
            "upsampling_scaling_factor",
            "encoder_block_out_channels",
            "decoder_block_out_channels",
        )
        configs.check_scaling(config)
        configs.check_least(config, 0, "num_encoder_blocks", "num_decoder_blocks")
        for part in ("encoder", "decoder"):
            widths = getattr(config, f"{part}_block_out_channels")
            counts = getattr(config, f"num_{part}_blocks")
            if len(set(widths)) > 1:  # no layer there changes the width
                raise InputError(
                    f"AutoencoderTinyConfig: {part}_block_out_channels = "
                    f"{list(widths)} is not supported: one width is expected"
                )
            if len(counts) != len(widths):
                raise InputError(
                    f"AutoencoderTinyConfig: num_{part}_blocks = {list(counts)} is "
                    f"not supported: {len(widths)} numbers are expected, as many as "
                    f"{part}_block_out_channels has"
                )
        return config

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Return the decoder's widths, under the name that an AutoencoderKL's config has."""
        return self.decoder_block_out_channels


class AutoencoderTinyBlock(nnx.Module):
    """Apply three convolutions with ReLUs between them, a residual, and a ReLU."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        def conv():
            return conv3x3(channels, channels, rngs=rngs)

        self.conv = nnx.List([conv(), Placeholder(), conv(), Placeholder(), conv()])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        hidden = jax.nn.relu(self.conv[0](x))
        hidden = jax.nn.relu(self.conv[2](hidden))
        return jax.nn.relu(self.conv[4](hidden) + x)


class ReLU(nnx.Module):
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jax.nn.relu(x)


class Upsample(nnx.Module):
    """Repeat every pixel `factor` times in both directions."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return jnp.repeat(jnp.repeat(x, self.factor, axis=1), self.factor, axis=2)


class EncoderTiny(nnx.Module):
    def __init__(self, config: AutoencoderTinyConfig, *, rngs: nnx.Rngs):
        width = config.encoder_block_out_channels[0]
        layers = []
        for i, blocks in enumerate(config.num_encoder_blocks):
            layers.append(
                conv3x3(config.in_channels, width, rngs=rngs)
                if i == 0
                else conv3x3(width, width, strides=2, use_bias=False, rngs=rngs)
            )
            layers += [AutoencoderTinyBlock(width, rngs=rngs) for _ in range(blocks)]
        layers.append(conv3x3(width, config.latent_channels, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = (images + 1) / 2  # TAESD's own images are in [0, 1]
        for layer in self.layers:
            x = layer(x)
        return x


class DecoderTiny(nnx.Module):
    def __init__(self, config: AutoencoderTinyConfig, *, rngs: nnx.Rngs):
        width = config.decoder_block_out_channels[0]
        layers = [conv3x3(config.latent_channels, width, rngs=rngs), ReLU()]
        for i, blocks in enumerate(config.num_decoder_blocks):
            layers += [AutoencoderTinyBlock(width, rngs=rngs) for _ in range(blocks)]
            if i < len(config.num_decoder_blocks) - 1:
                layers += [
                    Upsample(config.upsampling_scaling_factor),
                    conv3x3(width, width, use_bias=False, rngs=rngs),
                ]
        layers.append(conv3x3(width, config.out_channels, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 c"]:
        x = 3 * jnp.tanh(latents / 3)  # a soft clip
        for layer in self.layers:
            x = layer(x)
        return 2 * x - 1


class AutoencoderTiny(nnx.Module):
    """Map images in [-1, 1] to latents and back; latents are scaled as the denoiser has them."""

    def __init__(self, config: AutoencoderTinyConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = EncoderTiny(config, rngs=rngs)
        self.decoder = DecoderTiny(config, rngs=rngs)

    def encode(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Return the latents themselves: there is no posterior."""
        return self.encoder(images)

    def decode(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 c"]:
        """Return images, about [-1, 1] and not clipped."""
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Return the reconstruction; diffusers also rounds the latents to bytes, this does not."""
        return self.decode(self.encode(images))
