"""Convolutional blocks that the UNet and the VAE share (diffusers `models/resnet.py`)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import GroupNorm


def conv3x3(
    inputs: int,
    outputs: int,
    *,
    strides: int = 1,
    padding=((1, 1), (1, 1)),
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> Conv:
    # Explicit padding: flax's 'SAME' pads a stride of 2 on the bottom and right only.
    return Conv(
        inputs,
        outputs,
        kernel_size=(3, 3),
        strides=strides,
        padding=padding,
        use_bias=use_bias,
        rngs=rngs,
    )


class ResnetBlock2D(nnx.Module):
    """Apply GroupNorm-SiLU-conv twice, with the time embedding added in between, and a residual.

    With `time_scale_shift` the time scales and shifts the output of the second norm instead.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        time_embed_dim: int | None,
        norm_num_groups: int,
        norm_eps: float,
        time_scale_shift: bool = False,
        rngs: nnx.Rngs,
    ):
        self.time_scale_shift = time_scale_shift
        self.norm1 = GroupNorm(inputs, num_groups=norm_num_groups, epsilon=norm_eps, rngs=rngs)
        self.conv1 = conv3x3(inputs, outputs, rngs=rngs)
        if time_embed_dim is not None:
            self.time_emb_proj = Linear(
                time_embed_dim, 2 * outputs if time_scale_shift else outputs, rngs=rngs
            )
        self.norm2 = GroupNorm(outputs, num_groups=norm_num_groups, epsilon=norm_eps, rngs=rngs)
        self.conv2 = conv3x3(outputs, outputs, rngs=rngs)
        self.has_shortcut = inputs != outputs
        if self.has_shortcut:
            self.conv_shortcut = Conv(inputs, outputs, kernel_size=(1, 1), rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], time_embedding: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w d"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if time_embedding is not None:
            time = self.time_emb_proj(jax.nn.silu(time_embedding))[:, None, None, :]
        if self.time_scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden if time_embedding is None else hidden + time)
        hidden = self.conv2(jax.nn.silu(hidden))
        return hidden + (self.conv_shortcut(x) if self.has_shortcut else x)


class Downsample2D(nnx.Module):
    """Apply a convolution of stride 2; `padding` 0 adds a row and column at the end (the VAE)."""

    def __init__(self, channels: int, *, padding: int, rngs: nnx.Rngs):
        self.conv = conv3x3(
            channels, channels, strides=2, padding=((padding, padding or 1),) * 2, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Upsample by nearest pixels to twice the size, or to `size`, and apply a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c"]:
        _, h, w, _ = x.shape
        if size in (None, (2 * h, 2 * w)):
            return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        # torch's nearest takes floor(i * in / out); jax.image.resize would take pixel centres.
        x = jnp.take(x, jnp.arange(size[0]) * h // size[0], axis=1)
        x = jnp.take(x, jnp.arange(size[1]) * w // size[1], axis=2)
        return self.conv(x)
