"""The blocks of the denoising network: diffusers `models/unets/unet_2d_blocks.py`."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from r0_jax.models.repeat import repeat
from r0_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from r0_jax.models.transformer_2d import Transformer2DModel

if TYPE_CHECKING:  # that module imports this one
    from r0_jax.models.unet_2d_condition import UNet2DConditionConfig


class _Block(nnx.Module):
    """Apply resnets, each followed by a transformer where the level attends to the prompt."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        *,
        heads: int,
        depths: tuple[int, ...],
        attends: bool,
        only_cross_attention: bool = False,
        config: "UNet2DConditionConfig",
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            [
                ResnetBlock2D(
                    inputs,
                    outputs,
                    time_embed_dim=config.time_embed_dim,
                    norm_num_groups=config.norm_num_groups,
                    norm_eps=config.norm_eps,
                    time_scale_shift=config.resnet_time_scale_shift == "scale_shift",
                    rngs=rngs,
                )
                for inputs, outputs in widths
            ]
        )
        self.attends = attends
        if attends:
            # There are as many as depths: none behind a mid-block's last resnet.
            self.attentions = nnx.List(
                [
                    Transformer2DModel(
                        outputs,
                        heads,
                        depth,
                        config.cross_attention_dim,
                        norm_num_groups=config.norm_num_groups,
                        use_linear_projection=config.use_linear_projection,
                        only_cross_attention=only_cross_attention,
                        rngs=rngs,
                    )
                    for (_, outputs), depth in zip(widths, depths, strict=False)
                ]
            )

    def layer(self, i: int, x, time_embedding, prompt_embeds):
        x = repeat([self.resnets[i]], lambda resnet, x: resnet(x, time_embedding), x)
        return self.attentions[i](x, prompt_embeds) if self.attends else x


class DownBlock(_Block):
    """Mirror `DownBlock2D` and `CrossAttnDownBlock2D`."""

    def __init__(
        self, widths, *, downsamples: bool, config: "UNet2DConditionConfig", rngs, **kwargs
    ):
        super().__init__(widths, config=config, rngs=rngs, **kwargs)
        self.downsamples = downsamples
        if downsamples:
            self.downsamplers = nnx.List(
                [Downsample2D(widths[-1][1], padding=config.downsample_padding, rngs=rngs)]
            )

    def __call__(self, x, time_embedding, prompt_embeds):
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_embedding, prompt_embeds)
            skips.append(x)
        if self.downsamples:
            x = repeat(self.downsamplers, lambda downsampler, x: downsampler(x), x)
            skips.append(x)
        return x, skips


class UpBlock(_Block):
    """Mirror `UpBlock2D` and `CrossAttnUpBlock2D`."""

    def __init__(self, widths, *, upsamples: bool, config: "UNet2DConditionConfig", rngs, **kwargs):
        super().__init__(widths, config=config, rngs=rngs, **kwargs)
        self.upsamples = upsamples
        if upsamples:
            self.upsamplers = nnx.List([Upsample2D(widths[-1][1], rngs=rngs)])

    def __call__(self, x, skips, time_embedding, prompt_embeds):
        for i in range(len(self.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(i, x, time_embedding, prompt_embeds)
        if self.upsamples:
            # Odd sizes: the next level's skip connection says how large the map was.
            size = skips[-1].shape[1:3]
            x = repeat(self.upsamplers, lambda upsampler, x: upsampler(x, size=size), x)
        return x


class MidBlock(_Block):
    """Mirror `UNetMidBlock2DCrossAttn` (resnet, transformer, resnet) and `UNetMidBlock2D`."""

    def __init__(self, channels: int, *, heads: int, depth: int, config, rngs):
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        # Self-attention stays, whatever only_cross_attention says of the levels.
        super().__init__(
            [(channels, channels)] * (1 + attends),
            heads=heads,
            depths=(depth,),
            attends=attends,
            config=config,
            rngs=rngs,
        )

    def __call__(self, x, time_embedding, prompt_embeds):
        x = self.layer(0, x, time_embedding, prompt_embeds)
        if self.attends:
            x = repeat([self.resnets[1]], lambda resnet, x: resnet(x, time_embedding), x)
        return x
