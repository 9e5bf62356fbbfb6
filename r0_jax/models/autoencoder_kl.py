"""The image autoencoder: diffusers `models/autoencoders/autoencoder_kl.py` and `vae.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.attention import Attention
from r0_jax.models.linear import Conv
from r0_jax.models.normalization import GroupNorm
from r0_jax.models.repeat import repeat
from r0_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D, conv3x3

_EPS = 1e-6  # of every GroupNorm in the VAE; the UNet's is 1e-5


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Mirror the fields and defaults of diffusers' `AutoencoderKL`."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """Parse a published `vae/config.json`; raise InputError for what is not supported."""
        only = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}
        # Norms and softmax are float32 here, and nothing runs in float16.
        unused = frozenset({"force_upcast", "down_block_types", "up_block_types"})
        config = configs.parse(cls, fields, only=only, unused=unused | configs.EMA_FIELDS)
        configs.check_least(
            config, 1, "in_channels", "out_channels", "latent_channels", "layers_per_block"
        )
        configs.check_scaling(config)
        configs.check_groups(config)
        levels = len(config.block_out_channels)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            kinds = fields.get(name, (kind,))
            if not isinstance(kinds, list | tuple) or list(kinds) != [kind] * levels:
                raise InputError(
                    f"AutoencoderKLConfig: {name} = {kinds} is not supported: "
                    f"{levels} of {kind} are expected"
                )
        return config


def _resnet(inputs: int, outputs: int, config: AutoencoderKLConfig, rngs) -> ResnetBlock2D:
    return ResnetBlock2D(
        inputs,
        outputs,
        time_embed_dim=None,
        norm_eps=_EPS,
        norm_num_groups=config.norm_num_groups,
        rngs=rngs,
    )


class SpatialAttention(nnx.Module):
    """Attend with one head over all pixels of the smallest feature map; add a residual."""

    def __init__(self, channels: int, *, norm_num_groups: int, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, num_groups=norm_num_groups, epsilon=_EPS, rngs=rngs)
        attention = Attention(channels, 1, qkv_bias=True, rngs=rngs)
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out, self.heads = attention.to_out, attention.heads

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        hidden = self.group_norm(x).reshape(b, h * w, c)
        return x + Attention.__call__(self, hidden).reshape(b, h, w, c)


class MidBlock(nnx.Module):
    """Apply a resnet, attention, and a resnet."""

    def __init__(self, channels: int, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(channels, channels, config, rngs) for _ in range(2)])
        self.has_attention = config.mid_block_add_attention
        if self.has_attention:
            self.attentions = nnx.List(
                [SpatialAttention(channels, norm_num_groups=config.norm_num_groups, rngs=rngs)]
            )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        first, second = self.resnets
        x = repeat([first], lambda resnet, x: resnet(x), x)
        if self.has_attention:
            x = repeat(self.attentions, lambda attention, x: attention(x), x)
        return repeat([second], lambda resnet, x: resnet(x), x)


class DownEncoderBlock2D(nnx.Module):
    def __init__(self, inputs: int, outputs: int, config, *, downsamples: bool, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * (config.layers_per_block - 1)
        self.resnets = nnx.List([_resnet(c, outputs, config, rngs) for c in widths])
        self.downsamples = downsamples
        if downsamples:
            self.downsamplers = nnx.List([Downsample2D(outputs, padding=0, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = repeat(self.resnets, lambda resnet, x: resnet(x), x)
        return self.downsamplers[0](x) if self.downsamples else x


class UpDecoderBlock2D(nnx.Module):
    def __init__(self, inputs: int, outputs: int, config, *, upsamples: bool, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * config.layers_per_block
        self.resnets = nnx.List([_resnet(c, outputs, config, rngs) for c in widths])
        self.upsamples = upsamples
        if upsamples:
            self.upsamplers = nnx.List([Upsample2D(outputs, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = repeat(self.resnets, lambda resnet, x: resnet(x), x)
        if self.upsamples:
            x = repeat(self.upsamplers, lambda upsampler, x: upsampler(x), x)
        return x


class Encoder(nnx.Module):
    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = conv3x3(config.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(
                    widths[max(i - 1, 0)], width, config, downsamples=i < len(widths) - 1, rngs=rngs
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = GroupNorm(
            widths[-1], num_groups=config.norm_num_groups, epsilon=_EPS, rngs=rngs
        )
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = conv3x3(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(
                    widths[max(i - 1, 0)], width, config, upsamples=i < len(widths) - 1, rngs=rngs
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(
            widths[-1], num_groups=config.norm_num_groups, epsilon=_EPS, rngs=rngs
        )
        self.conv_out = conv3x3(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Map images in [-1, 1] to latents and back; latents are not scaled by `scaling_factor`."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = Conv(moments, moments, kernel_size=(1, 1), rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(latents, latents, kernel_size=(1, 1), rngs=rngs)

    def encode(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 d"]]:
        """Return mean and log-variance (clipped to [-30, 20]) of the latents' posterior."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 c"]:
        """Return images, about [-1, 1] and not clipped."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the reconstruction from the posterior's mean."""
        return self.decode(self.encode(images)[0])
