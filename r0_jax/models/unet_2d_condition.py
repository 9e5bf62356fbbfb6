"""The denoising network: diffusers `models/unets/unet_2d_condition.py`, names and arithmetic."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.embeddings import TimestepEmbedding, sinusoidal
from r0_jax.models.normalization import GroupNorm
from r0_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D, conv3x3
from r0_jax.models.transformer_2d import Transformer2DModel


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """Fields and defaults of diffusers' `UNet2DConditionModel`."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads, a misnomer of diffusers
    use_linear_projection: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UNet2DConditionConfig":
        """Parses a published `unet/config.json`; InputError names what is not supported."""
        config = configs.parse(cls, fields, only=_ONLY, unused=_UNUSED)
        configs.check_least(config, 1, "in_channels", "out_channels", "cross_attention_dim")
        configs.check_groups(config)
        levels = len(config.block_out_channels)
        for name, known in (("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
                            ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D"))):
            kinds = getattr(config, name)
            if len(kinds) != levels or not set(kinds) <= set(known):
                raise InputError(f"UNet2DConditionConfig: {name} = {list(kinds)} is not supported: "
                                 f"{levels} of {', '.join(known)} are expected")
        for name in ("attention_head_dim", "transformer_layers_per_block", "layers_per_block"):
            values = config.per_level(name)
            if len(values) != levels or not all(isinstance(value, int) for value in values):
                raise InputError(f"UNet2DConditionConfig: {name} = {values} is not supported: "
                                 f"one whole number, or {levels} of them, are expected")
        configs.check_least(config, 1, "layers_per_block")
        configs.check_least(config, 0, "transformer_layers_per_block")
        kinds = zip(config.down_block_types, reversed(config.up_block_types), strict=True)
        for i, (down, up) in enumerate(kinds):
            heads, width = config.per_level("attention_head_dim")[i], config.block_out_channels[i]
            attends = i == levels - 1 or "CrossAttn" in down + up  # the mid-block always does
            if attends and not 1 <= heads <= width:
                raise InputError(f"UNet2DConditionConfig: attention_head_dim, which is the number "
                                 f"of heads, = {heads} is not supported: 1 to {width} are expected "
                                 f"at a level of {width} channels")
        return config

    def per_level(self, name: str) -> tuple[int, ...]:
        """A field that is one number or one a resolution level, as one a level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


# Fields that change the network, with the only values implemented.
_ONLY = {
    "act_fn": ("silu", "swish"), "center_input_sample": (False,), "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "num_attention_heads": (None,),
    "dual_cross_attention": (False,), "class_embed_type": (None,), "addition_embed_type": (None,),
    "num_class_embeds": (None,), "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "cross_attention_norm": (None,),
}
# Fields without an effect on the output: softmax is float32 here whatever upcast_attention says,
# and the rest only matter together with a field above that is refused.
_UNUSED = frozenset({"upcast_attention", "dropout", "addition_time_embed_dim",
                     "addition_embed_type_num_heads", "projection_class_embeddings_input_dim"})


class _Block(nnx.Module):
    """Resnets, each followed by a transformer where the level attends to the prompt."""

    def __init__(self, widths: list[tuple[int, int]], *, heads: int, depth: int, attends: bool,
                 config: UNet2DConditionConfig, rngs: nnx.Rngs):
        self.resnets = nnx.List([
            ResnetBlock2D(inputs, outputs, time_embed_dim=4 * config.block_out_channels[0],
                          norm_num_groups=config.norm_num_groups, norm_eps=config.norm_eps,
                          rngs=rngs)
            for inputs, outputs in widths])
        self.attends = attends
        if attends:
            self.attentions = nnx.List([
                Transformer2DModel(outputs, heads, depth, config.cross_attention_dim,
                                   norm_num_groups=config.norm_num_groups,
                                   use_linear_projection=config.use_linear_projection, rngs=rngs)
                for _, outputs in widths])

    def layer(self, i: int, x, time_embedding, prompt_embeds):
        x = self.resnets[i](x, time_embedding)
        return self.attentions[i](x, prompt_embeds) if self.attends else x


class DownBlock(_Block):
    """`DownBlock2D` and `CrossAttnDownBlock2D`."""

    def __init__(self, widths, *, downsamples: bool, config: UNet2DConditionConfig, rngs, **kwargs):
        super().__init__(widths, config=config, rngs=rngs, **kwargs)
        self.downsamples = downsamples
        if downsamples:
            self.downsamplers = nnx.List([
                Downsample2D(widths[-1][1], padding=config.downsample_padding, rngs=rngs)])

    def __call__(self, x, time_embedding, prompt_embeds):
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_embedding, prompt_embeds)
            skips.append(x)
        if self.downsamples:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpBlock(_Block):
    """`UpBlock2D` and `CrossAttnUpBlock2D`."""

    def __init__(self, widths, *, upsamples: bool, config: UNet2DConditionConfig, rngs, **kwargs):
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
            x = self.upsamplers[0](x, size=skips[-1].shape[1:3])
        return x


class MidBlock(_Block):
    """`UNetMidBlock2DCrossAttn`: resnet, transformer, resnet."""

    def __init__(self, channels: int, *, heads: int, depth: int, config, rngs):
        super().__init__([(channels, channels)] * 2, heads=heads, depth=depth, attends=False,
                         config=config, rngs=rngs)
        self.attentions = nnx.List([
            Transformer2DModel(channels, heads, depth, config.cross_attention_dim,
                               norm_num_groups=config.norm_num_groups,
                               use_linear_projection=config.use_linear_projection, rngs=rngs)])

    def __call__(self, x, time_embedding, prompt_embeds):
        x = self.resnets[0](x, time_embedding)
        x = self.attentions[0](x, prompt_embeds)
        return self.resnets[1](x, time_embedding)


class UNet2DConditionModel(nnx.Module):
    """Predicts noise (or what the scheduler's `prediction_type` says) from noisy latents."""

    def __init__(self, config: UNet2DConditionConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))
        heads = config.per_level("attention_head_dim")
        depths = config.per_level("transformer_layers_per_block")
        layers = config.per_level("layers_per_block")

        self.conv_in = conv3x3(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], rngs=rngs)

        self.down_blocks = nnx.List()
        skips = [widths[0]]  # channels of the skip connections, in the order they are pushed
        for i in levels:
            inputs = [widths[max(i - 1, 0)]] + [widths[i]] * (layers[i] - 1)
            last = i == levels[-1]
            self.down_blocks.append(DownBlock(
                [(c, widths[i]) for c in inputs], downsamples=not last, heads=heads[i],
                depth=depths[i], attends=config.down_block_types[i] == "CrossAttnDownBlock2D",
                config=config, rngs=rngs))
            skips += [widths[i]] * (layers[i] + (not last))

        self.mid_block = MidBlock(widths[-1], heads=heads[-1], depth=depths[-1], config=config,
                                  rngs=rngs)

        self.up_blocks = nnx.List()
        channels = widths[-1]
        for kind, i in zip(config.up_block_types, reversed(levels), strict=True):
            block_widths = []
            for _ in range(layers[i] + 1):
                block_widths.append((channels + skips.pop(), widths[i]))
                channels = widths[i]
            self.up_blocks.append(UpBlock(
                block_widths, upsamples=i > 0, heads=heads[i], depth=depths[i],
                attends=kind == "CrossAttnUpBlock2D", config=config, rngs=rngs))

        self.conv_norm_out = GroupNorm(widths[0], num_groups=config.norm_num_groups,
                                       epsilon=config.norm_eps, rngs=rngs)
        self.conv_out = conv3x3(widths[0], config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s d"],
    ) -> Float[Array, "b h w out"]:
        """The prediction at `timesteps` (0 to 1000) given the prompt."""
        x, skips, time_embedding = self._encode(latents, timesteps, prompt_embeds)
        for block in self.up_blocks:
            x = block(x, skips, time_embedding, prompt_embeds)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def mid_features(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s d"],
    ) -> Float[Array, "b hm wm cm"]:
        """The mid-block's output: the network's own perceptual features, at half of its cost."""
        return self._encode(latents, timesteps, prompt_embeds)[0]

    def _encode(self, latents, timesteps, prompt_embeds):
        sinusoids = sinusoidal(timesteps, self.config.block_out_channels[0],
                               flip_sin_to_cos=self.config.flip_sin_to_cos,
                               freq_shift=self.config.freq_shift)
        time_embedding = self.time_embedding(sinusoids)  # [B, 4 C]
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time_embedding, prompt_embeds)
            skips += more
        return self.mid_block(x, time_embedding, prompt_embeds), skips, time_embedding
