"""SD3's denoising network (MMDiT): diffusers `models/transformers/transformer_sd3.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.attention import GELU, FeedForward, Placeholder, dot_product_attention
from r0_jax.models.embeddings import TimestepEmbedding, sinusoidal
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat

_EPS = 1e-6  # of every norm
_SINUSOIDS = 256  # channels of the timestep's sines and cosines


@dataclasses.dataclass(frozen=True)
class SD3Transformer2DConfig:
    """Mirror the fields and defaults of diffusers' `SD3Transformer2DModel`."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64  # here the name is right, unlike in the UNet
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SD3Transformer2DConfig":
        """Parse a `transformer/config.json`; raise InputError for what is not supported."""
        config = configs.parse(cls, fields, unused=configs.EMA_FIELDS)
        configs.check_least(
            config, 1, *(field.name for field in dataclasses.fields(cls) if field.type is int)
        )
        configs.check_least(config, config.patch_size, "sample_size")
        if config.width % 4:  # sines and cosines of a row and a column
            raise InputError(
                f"SD3Transformer2DConfig: attention_head_dim = "
                f"{config.attention_head_dim} is not supported: with "
                f"num_attention_heads = {config.num_attention_heads} it makes "
                f"{config.width} channels, not a multiple of 4"
            )
        if config.caption_projection_dim != config.width:
            raise InputError(
                f"SD3Transformer2DConfig: caption_projection_dim = "
                f"{config.caption_projection_dim} is not supported: text and image "
                f"tokens attend to each other, and the image's have {config.width} "
                "channels (attention_head_dim x num_attention_heads)"
            )
        if not set(config.dual_attention_layers) <= set(range(config.num_layers)):
            raise InputError(
                f"SD3Transformer2DConfig: dual_attention_layers = "
                f"{list(config.dual_attention_layers)} is not supported: layers are "
                f"counted from 0 to {config.num_layers - 1}"
            )
        if config.qk_norm not in (None, "rms_norm"):
            raise InputError(
                f"SD3Transformer2DConfig: qk_norm = {config.qk_norm!r} is not "
                "supported (supported: null, rms_norm)"
            )
        return config

    @property
    def width(self) -> int:
        """Return the channels of a token."""
        return self.attention_head_dim * self.num_attention_heads


class PatchEmbed(nnx.Module):
    """Map latents to one token a patch, and add the sines and cosines of its column and row."""

    def __init__(self, config: SD3Transformer2DConfig, *, rngs: nnx.Rngs):
        patch, self.table_size = config.patch_size, config.pos_embed_max_size
        self.proj = Conv(
            config.in_channels,
            config.width,
            kernel_size=(patch, patch),
            strides=patch,
            padding="VALID",
            rngs=rngs,
        )
        # It is fixed, but the file holds it. As a parameter it is read and written like the rest.
        self.pos_embed = nnx.Param(
            _positions(self.table_size, config.sample_size // patch, config.width)
        )

    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b hp wp d"]:
        tokens = self.proj(latents)
        _, h, w, width = tokens.shape
        size = self.table_size
        if max(h, w) > size:
            raise InputError(
                f"latents of {h} x {w} patches are too large for the transformer: "
                f"its pos_embed_max_size is {size}"
            )
        table = jax.lax.stop_gradient(self.pos_embed.get_value()).reshape(1, size, size, width)
        top, left = (size - h) // 2, (size - w) // 2
        return (tokens + table[:, top : top + h, left : left + w]).astype(tokens.dtype)


def _positions(size: int, base_size: int, channels: int) -> Float[Array, "1 t c"]:
    """Return the table of size x size patches, which span what base_size x base_size did first."""
    places = jnp.arange(size, dtype=jnp.float32) * base_size / size
    axis = sinusoidal(places, channels // 2, flip_sin_to_cos=False, freq_shift=0)  # [size, C / 2]
    columns = jnp.broadcast_to(axis[None], (size, *axis.shape))
    rows = jnp.broadcast_to(axis[:, None], (size, *axis.shape))
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size * size, channels)


class CombinedTimestepTextProjEmbeddings(nnx.Module):
    """Embed the timestep and the whole prompt into the vector that every block gets."""

    def __init__(self, config: SD3Transformer2DConfig, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(_SINUSOIDS, config.width, rngs=rngs)
        # The same two layers, for the pooled text.
        self.text_embedder = TimestepEmbedding(
            config.pooled_projection_dim, config.width, rngs=rngs
        )

    def __call__(
        self, timesteps: Float[Array, " b"], pooled_prompt_embeds: Float[Array, "b p"]
    ) -> Float[Array, "b d"]:
        sinusoids = sinusoidal(timesteps, _SINUSOIDS, flip_sin_to_cos=True, freq_shift=0)
        return self.timestep_embedder(sinusoids) + self.text_embedder(pooled_prompt_embeds)


def _layer_norm(channels: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return LayerNorm(channels, epsilon=_EPS, use_scale=False, use_bias=False, rngs=rngs)


def _modulate(x, shift, scale):
    return x * (1 + scale) + shift


class AdaLayerNorm(nnx.Module):
    """Apply a LayerNorm without weights, and give `vectors` to shift, scale and gate by.

    It mirrors diffusers' `AdaLayerNormZero` (6 vectors), `SD35AdaLayerNormZeroX` (9) and
    `AdaLayerNormContinuous` (2, in the order scale, shift).
    """

    def __init__(self, channels: int, vectors: int, *, rngs: nnx.Rngs):
        self.vectors = vectors
        self.linear = Linear(channels, vectors * channels, rngs=rngs)
        self.norm = _layer_norm(channels, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], conditioning: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b t d"], list[Float[Array, "b 1 d"]]]:
        vectors = self.linear(jax.nn.silu(conditioning))[:, None]
        return self.norm(x), jnp.split(vectors, self.vectors, axis=-1)


class SelfAttention(nnx.Module):
    """Attend among the image's tokens; queries and keys are normalized as in SD3.5."""

    def __init__(self, config: SD3Transformer2DConfig, *, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (_linear(config, rngs) for _ in range(3))
        self.to_out = nnx.List([_linear(config, rngs), Placeholder()])
        self.normalizes = config.qk_norm is not None
        if self.normalizes:
            self.norm_q, self.norm_k = (_rms_norm(config, rngs) for _ in range(2))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.to_out[0](dot_product_attention(*self._image(x), self.heads))

    def _image(self, x):
        query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.normalizes:
            query, key = self._per_head(self.norm_q, query), self._per_head(self.norm_k, key)
        return query, key, value

    def _per_head(self, norm, x):
        b, t, width = x.shape
        return norm(x.reshape(b, t, self.heads, -1)).reshape(b, t, width)


class JointAttention(SelfAttention):
    """Attend among the tokens of image and text, each with projections of its own."""

    def __init__(self, config: SD3Transformer2DConfig, *, context_pre_only: bool, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.context_pre_only = context_pre_only
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            _linear(config, rngs) for _ in range(3)
        )
        if not context_pre_only:
            self.to_add_out = _linear(config, rngs)
        if self.normalizes:
            self.norm_added_q, self.norm_added_k = (_rms_norm(config, rngs) for _ in range(2))

    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"] | None]:
        pairs = zip(self._image(x), self._text(context), strict=True)
        joined = (jnp.concatenate(pair, axis=1) for pair in pairs)  # the image comes first
        out = dot_product_attention(*joined, self.heads)
        image, text = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](image), None if self.context_pre_only else self.to_add_out(text)

    def _text(self, context):
        query, key, value = (
            proj(context) for proj in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        if self.normalizes:
            query = self._per_head(self.norm_added_q, query)
            key = self._per_head(self.norm_added_k, key)
        return query, key, value


def _linear(config: SD3Transformer2DConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(config.width, config.width, rngs=rngs)


def _rms_norm(config: SD3Transformer2DConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.attention_head_dim, epsilon=_EPS, rngs=rngs)


class JointTransformerBlock(nnx.Module):
    """Attend over image and text together, then apply a feed-forward to each.

    With `context_pre_only` (the last block) the text is read but not changed. With
    `dual_attention` the image also attends to itself alone.
    """

    def __init__(
        self,
        config: SD3Transformer2DConfig,
        *,
        context_pre_only: bool,
        dual_attention: bool,
        rngs: nnx.Rngs,
    ):
        width = config.width
        self.context_pre_only, self.dual_attention = context_pre_only, dual_attention
        self.norm1 = AdaLayerNorm(width, 9 if dual_attention else 6, rngs=rngs)
        self.norm1_context = AdaLayerNorm(width, 2 if context_pre_only else 6, rngs=rngs)
        self.attn = JointAttention(config, context_pre_only=context_pre_only, rngs=rngs)
        if dual_attention:
            self.attn2 = SelfAttention(config, rngs=rngs)
        self.norm2 = _layer_norm(width, rngs)
        self.ff = FeedForward(width, activation=GELU, rngs=rngs)
        if not context_pre_only:
            self.norm2_context = _layer_norm(width, rngs)
            self.ff_context = FeedForward(width, activation=GELU, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Float[Array, "b s d"],
        conditioning: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"] | None]:
        normed, vectors = self.norm1(x, conditioning)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = vectors
        context_normed, vectors = self.norm1_context(context, conditioning)
        if self.context_pre_only:
            context_scale, context_shift = vectors
        else:
            context_shift, context_scale, context_gate, *context_mlp = vectors

        attended, context_attended = self.attn(
            _modulate(normed, shift, scale), _modulate(context_normed, context_shift, context_scale)
        )
        x = x + gate * attended
        if self.dual_attention:
            shift, scale, gate = dual
            x = x + gate * self.attn2(_modulate(normed, shift, scale))
        x = x + gate_mlp * self.ff(_modulate(self.norm2(x), shift_mlp, scale_mlp))
        if self.context_pre_only:
            return x, None

        context = context + context_gate * context_attended
        shift_mlp, scale_mlp, gate_mlp = context_mlp
        hidden = _modulate(self.norm2_context(context), shift_mlp, scale_mlp)
        return x, context + gate_mlp * self.ff_context(hidden)


class SD3Transformer2DModel(nnx.Module):
    """Predict the velocity noise - image (in latents) from noisy latents."""

    def __init__(self, config: SD3Transformer2DConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.pos_embed = PatchEmbed(config, rngs=rngs)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(config, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                JointTransformerBlock(
                    config,
                    context_pre_only=i == config.num_layers - 1,
                    dual_attention=i in config.dual_attention_layers,
                    rngs=rngs,
                )
                for i in range(config.num_layers)
            ]
        )
        self.norm_out = AdaLayerNorm(width, 2, rngs=rngs)
        self.proj_out = Linear(width, config.patch_size**2 * config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s e"],
        pooled_prompt_embeds: Float[Array, "b p"],
    ) -> Float[Array, "b h2 w2 out"]:
        """Return the prediction at `timesteps` (0 to 1000: sigma times 1000) given the prompt.

        It drops rows and columns of latents that do not fill a patch, as diffusers does.
        """
        tokens, conditioning = self._transform(
            latents, timesteps, prompt_embeds, pooled_prompt_embeds, self.config.num_layers
        )
        b, h, w, width = tokens.shape
        normed, (scale, shift) = self.norm_out(tokens.reshape(b, h * w, width), conditioning)
        patch = self.config.patch_size
        patches = self.proj_out(_modulate(normed, shift, scale)).reshape(b, h, w, patch, patch, -1)
        return patches.swapaxes(2, 3).reshape(b, h * patch, w * patch, -1)

    def mid_features(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s e"],
        pooled_prompt_embeds: Float[Array, "b p"],
    ) -> Float[Array, "b hm wm cm"]:
        """Return the image's tokens after half of the blocks, as a map of features."""
        return self._transform(
            latents,
            timesteps,
            prompt_embeds,
            pooled_prompt_embeds,
            (self.config.num_layers + 1) // 2,
        )[0]

    def _transform(self, latents, timesteps, prompt_embeds, pooled_prompt_embeds, blocks: int):
        tokens = self.pos_embed(latents)
        b, h, w, width = tokens.shape
        conditioning = self.time_text_embed(timesteps, pooled_prompt_embeds)
        x, context = tokens.reshape(b, h * w, width), self.context_embedder(prompt_embeds)
        x, _ = repeat(
            list(self.transformer_blocks)[:blocks],
            lambda block, pair: block(*pair, conditioning),
            (x, context),
        )
        return x.reshape(b, h, w, width), conditioning
