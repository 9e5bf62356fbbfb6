"""The denoising network: diffusers `models/unets/unet_2d_condition.py`, names and arithmetic."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.embeddings import TimestepEmbedding, embed, sinusoidal
from r0_jax.models.linear import Linear
from r0_jax.models.normalization import GroupNorm
from r0_jax.models.resnet import conv3x3
from r0_jax.models.unet_2d_blocks import DownBlock, MidBlock, UpBlock


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """Mirror the fields and defaults of diffusers' `UNet2DConditionModel`."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280  # one number once it is read
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads, a misnomer of diffusers
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    class_embeddings_concat: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    resnet_time_scale_shift: str = "default"
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UNet2DConditionConfig":
        """Parse a published `unet/config.json`; raise InputError for what is not supported."""
        config = configs.parse(cls, fields, only=_ONLY, unused=_UNUSED | configs.EMA_FIELDS)
        configs.check_least(config, 1, "in_channels", "out_channels", "cross_attention_dim")
        if config.sample_size is not None:
            configs.check_least(config, 1, "sample_size")
        configs.check_groups(config)
        levels = len(config.block_out_channels)
        for name, known in (
            ("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
            ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D")),
        ):
            kinds = getattr(config, name)
            if len(kinds) != levels or not set(kinds) <= set(known):
                raise InputError(
                    f"UNet2DConditionConfig: {name} = {list(kinds)} is not supported: "
                    f"{levels} of {', '.join(known)} are expected"
                )
        for name in (
            "attention_head_dim",
            "transformer_layers_per_block",
            "layers_per_block",
            "reverse_transformer_layers_per_block",
            "only_cross_attention",
            "cross_attention_dim",
        ):
            values = config.per_level(name)
            if len(values) != levels:
                raise InputError(
                    f"UNet2DConditionConfig: {name} = {values} is not supported: "
                    f"one value, or {levels} of them, are expected"
                )
        width, *others = config.per_level("cross_attention_dim")
        if any(other != width for other in others):
            raise InputError(
                f"UNet2DConditionConfig: cross_attention_dim = "
                f"{list(config.cross_attention_dim)} is not supported: all levels "
                "read one prompt, of one width"
            )
        config = dataclasses.replace(config, cross_attention_dim=width)
        configs.check_least(config, 1, "layers_per_block")
        config._check_depths()
        config._check_embeddings()
        kinds = zip(config.down_block_types, reversed(config.up_block_types), strict=True)
        for i, (down, up) in enumerate(kinds):
            heads, width = config.per_level("attention_head_dim")[i], config.block_out_channels[i]
            mid = (config.mid_block_type or "") if i == levels - 1 else ""
            if "CrossAttn" in down + mid + up and not 1 <= heads <= width:
                raise InputError(
                    f"UNet2DConditionConfig: attention_head_dim, which is the number "
                    f"of heads, = {heads} is not supported: 1 to {width} are expected "
                    f"at a level of {width} channels"
                )
        return config

    def per_level(self, name: str) -> tuple[Any, ...]:
        """Return a field that is one value, or one a resolution level, as one a level."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def time_embed_dim(self) -> int:
        """Return the width of the embedding that the blocks get: time, and perhaps a class."""
        return 4 * self.block_out_channels[0] * (1 + self.class_embeddings_concat)

    def depths(self, level: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the transformer blocks behind each resnet of a level, on the way down and up."""
        layers = self.per_level("layers_per_block")[level]
        down = up = self.per_level("transformer_layers_per_block")[level]
        if self.reverse_transformer_layers_per_block is not None:
            up = self.reverse_transformer_layers_per_block[::-1][level]
        return (
            down if isinstance(down, tuple) else (down,) * layers,
            up if isinstance(up, tuple) else (up,) * (layers + 1),
        )

    def _check_depths(self) -> None:
        for i, layers in enumerate(self.per_level("layers_per_block")):
            for name, depths, count in zip(
                ("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
                self.depths(i),
                (layers, layers + 1),
                strict=True,
            ):
                if len(depths) != count or min(depths) < 0:
                    raise InputError(
                        f"UNet2DConditionConfig: {name} = {getattr(self, name)} is not supported: "
                        f"one number of 0 or more, or {count} of them, are expected at the level "
                        f"of {self.block_out_channels[i]} channels"
                    )

    def _check_embeddings(self) -> None:
        classes = self.class_embed_type is not None or self.num_class_embeds is not None
        if self.class_embeddings_concat and (self.addition_embed_type is not None or not classes):
            raise InputError(
                "UNet2DConditionConfig: class_embeddings_concat = true is not "
                "supported without a class, or with an addition_embed_type"
            )
        adds_text_time = self.addition_embed_type == "text_time"
        projects = adds_text_time or self.class_embed_type in ("projection", "simple_projection")
        for name, needed in (
            ("addition_time_embed_dim", adds_text_time),
            ("projection_class_embeddings_input_dim", projects),
            ("num_class_embeds", False),
            ("time_cond_proj_dim", False),
        ):
            if getattr(self, name) is not None:
                configs.check_least(self, 1, name)
            elif needed:
                raise InputError(
                    f"UNet2DConditionConfig: {name} is missing, but addition_embed_type = "
                    f"{self.addition_embed_type} with class_embed_type = {self.class_embed_type} "
                    "needs it"
                )


# Fields that change the network, with the only values implemented.
_ONLY = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}
# Fields without an effect on the output. Softmax is float32 here whatever upcast_attention says;
# the others only matter together with a value above that is an error.
_UNUSED = frozenset(
    {
        "upcast_attention",
        "dropout",
        "addition_embed_type_num_heads",
        "mid_block_only_cross_attention",
    }
)


def _class_embedding(config: UNet2DConditionConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    inputs, outputs = config.projection_class_embeddings_input_dim, 4 * config.block_out_channels[0]
    if config.class_embed_type is None and config.num_class_embeds is not None:
        return embed(config.num_class_embeds, outputs, rngs=rngs)
    if config.class_embed_type == "timestep":
        return TimestepEmbedding(config.block_out_channels[0], outputs, rngs=rngs)
    if config.class_embed_type == "projection":
        return TimestepEmbedding(inputs, outputs, rngs=rngs)
    if config.class_embed_type == "simple_projection":
        return Linear(inputs, outputs, rngs=rngs)
    return None


class UNet2DConditionModel(nnx.Module):
    """Predict noise (or what the scheduler's `prediction_type` says) from noisy latents."""

    def __init__(self, config: UNet2DConditionConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))
        heads = config.per_level("attention_head_dim")
        layers = config.per_level("layers_per_block")
        only_cross = config.per_level("only_cross_attention")

        self.conv_in = conv3x3(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(
            widths[0], 4 * widths[0], cond_proj_dim=config.time_cond_proj_dim, rngs=rngs
        )
        class_embedding = _class_embedding(config, rngs)
        if class_embedding is not None:
            self.class_embedding = class_embedding
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, 4 * widths[0], rngs=rngs
            )

        self.down_blocks = nnx.List()
        skips = [widths[0]]  # channels of the skip connections, in the order they are pushed
        for i in levels:
            inputs = [widths[max(i - 1, 0)]] + [widths[i]] * (layers[i] - 1)
            last = i == levels[-1]
            self.down_blocks.append(
                DownBlock(
                    [(c, widths[i]) for c in inputs],
                    downsamples=not last,
                    heads=heads[i],
                    depths=config.depths(i)[0],
                    only_cross_attention=only_cross[i],
                    attends=config.down_block_types[i] == "CrossAttnDownBlock2D",
                    config=config,
                    rngs=rngs,
                )
            )
            skips += [widths[i]] * (layers[i] + (not last))

        if config.mid_block_type is not None:
            self.mid_block = MidBlock(
                widths[-1],
                heads=heads[-1],
                depth=config.depths(levels[-1])[0][0],
                config=config,
                rngs=rngs,
            )

        self.up_blocks = nnx.List()
        channels = widths[-1]
        for kind, i in zip(config.up_block_types, reversed(levels), strict=True):
            block_widths = []
            for _ in range(layers[i] + 1):
                block_widths.append((channels + skips.pop(), widths[i]))
                channels = widths[i]
            self.up_blocks.append(
                UpBlock(
                    block_widths,
                    upsamples=i > 0,
                    heads=heads[i],
                    depths=config.depths(i)[1],
                    only_cross_attention=only_cross[i],
                    attends=kind == "CrossAttnUpBlock2D",
                    config=config,
                    rngs=rngs,
                )
            )

        self.conv_norm_out = GroupNorm(
            widths[0], num_groups=config.norm_num_groups, epsilon=config.norm_eps, rngs=rngs
        )
        self.conv_out = conv3x3(widths[0], config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s d"],
        pooled_prompt_embeds: Float[Array, "b p"] | None = None,
        add_time_ids: Float[Array, "b n"] | Int[Array, "b n"] | None = None,
        class_labels: Float[Array, " b *k"] | Int[Array, " b"] | None = None,
        timestep_cond: Float[Array, "b q"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """Return the prediction at `timesteps` (0 to 1000) given the prompt.

        Args:
          pooled_prompt_embeds, add_time_ids: of an `addition_embed_type` "text_time" (SDXL).
          class_labels: of a `class_embed_type` or `num_class_embeds`.
          timestep_cond: of a `time_cond_proj_dim` (LCM's embedded guidance); None skips it.
        """
        x, skips, time_embedding = self._encode(
            latents,
            timesteps,
            prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            add_time_ids=add_time_ids,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
        )
        for block in self.up_blocks:
            x = block(x, skips, time_embedding, prompt_embeds)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def mid_features(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s d"],
        **conditions: Array | None,
    ) -> Float[Array, "b hm wm cm"]:
        """Return the mid-block's output, perceptual features at half of the network's cost.

        `conditions` are the other arguments of `__call__`, by name.
        """
        return self._encode(latents, timesteps, prompt_embeds, **conditions)[0]

    def _embed(
        self,
        timesteps,
        *,
        pooled_prompt_embeds=None,
        add_time_ids=None,
        class_labels=None,
        timestep_cond=None,
    ) -> Float[Array, "b t"]:
        """Return the embedding of the time and of the conditions that are added to it."""
        config, channels = self.config, self.config.block_out_channels[0]
        sinusoids = functools.partial(
            sinusoidal, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        embedding = self.time_embedding(sinusoids(timesteps, channels), timestep_cond)
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            _require(class_labels=class_labels)
            if config.class_embed_type == "timestep":
                class_labels = sinusoids(class_labels.astype(jnp.float32), channels)
            if config.class_embed_type != "identity":
                class_labels = self.class_embedding(class_labels)
            class_labels = class_labels.astype(embedding.dtype)
            if config.class_embeddings_concat:
                return jnp.concatenate([embedding, class_labels], axis=-1)
            embedding = embedding + class_labels
        if config.addition_embed_type == "text_time":
            _require(pooled_prompt_embeds=pooled_prompt_embeds, add_time_ids=add_time_ids)
            times = sinusoids(
                add_time_ids.reshape(-1).astype(jnp.float32), config.addition_time_embed_dim
            )
            times = times.reshape(len(add_time_ids), -1)  # [B, ids x dim]
            embedding = embedding + self.add_embedding(
                jnp.concatenate([pooled_prompt_embeds, times], axis=-1)
            )
        return embedding

    def _encode(self, latents, timesteps, prompt_embeds, **conditions):
        time_embedding = self._embed(timesteps, **conditions)  # [B, 4 C], or 8 C with a class
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time_embedding, prompt_embeds)
            skips += more
        if self.config.mid_block_type is not None:
            x = self.mid_block(x, time_embedding, prompt_embeds)
        return x, skips, time_embedding


def _require(**conditions: Array | None) -> None:
    missing = [name for name, value in conditions.items() if value is None]
    if missing:
        raise ValueError(f"the network's config asks for {' and '.join(missing)} as well")
