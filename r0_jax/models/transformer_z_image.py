"""Z-Image's denoising network (S3-DiT): diffusers `models/transformers/transformer_z_image.py`.

Image and caption are one sequence. Two blocks refine each of them alone, then all attend to all.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.attention import Placeholder, join_heads, split_heads
from r0_jax.models.attention_backend import attend
from r0_jax.models.embeddings import rotary_angles, rotate_pairs, sinusoidal
from r0_jax.models.linear import Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat

_SINUSOIDS = 256  # channels of the timestep's sines and cosines
_TIME_HIDDEN = 1024
_MOST_TIME = 256  # channels of the embedded timestep, or fewer in a narrow network
_QK_EPS = 1e-5  # of the norms of queries and keys, whatever norm_eps says
_FINAL_EPS = 1e-6
MULTIPLE = 32  # captions and images are filled up to multiples of so many tokens
_ONLY = {"all_f_patch_size": ((1,),), "qk_norm": (True,), "siglip_feat_dim": (None,)}


@dataclasses.dataclass(frozen=True)
class ZImageTransformer2DConfig:
    """Mirror the fields and defaults of diffusers' `ZImageTransformer2DModel`."""

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ZImageTransformer2DConfig":
        """Parse a `transformer/config.json`; raise InputError for what is not supported."""
        config = configs.parse(cls, fields, only=_ONLY, unused=configs.EMA_FIELDS)
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        configs.check_least(config, 1, *(name for name, kind in types.items() if kind is int))
        configs.check_least(config, 1, "all_patch_size", "axes_dims", "axes_lens")

        def refuse(name: str, expected: str) -> None:
            raise InputError(
                f"ZImageTransformer2DConfig: {name} = {getattr(config, name)} is not supported: "
                f"{expected} is expected"
            )

        if len(config.all_patch_size) != 1:
            refuse("all_patch_size", "one patch size")
        if config.dim % config.n_heads:
            refuse("n_heads", f"a divisor of dim = {config.dim}")
        if config.n_kv_heads != config.n_heads:
            refuse("n_kv_heads", f"n_heads = {config.n_heads}")
        head = config.dim // config.n_heads
        if len(config.axes_dims) != 3 or sum(config.axes_dims) != head:
            refuse("axes_dims", f"three numbers whose sum is dim / n_heads = {head}")
        if any(channels % 2 for channels in config.axes_dims):
            refuse("axes_dims", "three even numbers")
        if len(config.axes_lens) != 3:
            refuse("axes_lens", "three numbers")
        return config

    @property
    def patch_size(self) -> int:
        """Return the latents on each side of a token."""
        return self.all_patch_size[0]

    @property
    def time_dim(self) -> int:
        """Return the channels of the embedded timestep."""
        return min(self.dim, _MOST_TIME)


class TimestepEmbedder(nnx.Module):
    """Embed times, 0 (noise) to 1 (data) times t_scale."""

    def __init__(self, config: ZImageTransformer2DConfig, *, rngs: nnx.Rngs):
        self.mlp = nnx.List(
            [
                Linear(_SINUSOIDS, _TIME_HIDDEN, rngs=rngs),
                Placeholder(),
                Linear(_TIME_HIDDEN, config.time_dim, rngs=rngs),
            ]
        )

    def __call__(self, times: Float[Array, " b"]) -> Float[Array, "b e"]:
        sinusoids = sinusoidal(times, _SINUSOIDS, flip_sin_to_cos=True, freq_shift=0)
        sinusoids = sinusoids.astype(self.mlp[0].kernel.get_value().dtype)
        return self.mlp[2](jax.nn.silu(self.mlp[0](sinusoids)))


class ZImageAttention(nnx.Module):
    """Attend to all tokens; queries and keys are normed, then turn with their position."""

    def __init__(self, config: ZImageTransformer2DConfig, *, rngs: nnx.Rngs):
        self.heads = config.n_heads
        self.to_q, self.to_k, self.to_v = (_linear(config.dim, config.dim, rngs) for _ in range(3))
        self.to_out = nnx.List([_linear(config.dim, config.dim, rngs), Placeholder()])
        head = config.dim // config.n_heads
        self.norm_q, self.norm_k = (nnx.RMSNorm(head, epsilon=_QK_EPS, rngs=rngs) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "#b t half"],
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b t d"]:
        query, key, value = (
            split_heads(proj(x), self.heads) for proj in (self.to_q, self.to_k, self.to_v)
        )
        query = rotate_pairs(self.norm_q(query), angles)
        key = rotate_pairs(self.norm_k(key), angles)
        return self.to_out[0](join_heads(attend(query, key, value, lengths=lengths)))


class ZImageFeedForward(nnx.Module):
    """Apply a gated linear unit with SiLU, 8/3 times as wide."""

    def __init__(self, config: ZImageTransformer2DConfig, *, rngs: nnx.Rngs):
        inner = int(config.dim / 3 * 8)
        self.w1 = _linear(config.dim, inner, rngs)
        self.w2 = _linear(inner, config.dim, rngs)
        self.w3 = _linear(config.dim, inner, rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))


class ZImageTransformerBlock(nnx.Module):
    """Apply attention and a feed-forward, each between two norms.

    With `modulation` the timestep scales what both read and gates what both add.
    """

    def __init__(self, config: ZImageTransformer2DConfig, *, modulation: bool, rngs: nnx.Rngs):
        self.attention = ZImageAttention(config, rngs=rngs)
        self.feed_forward = ZImageFeedForward(config, rngs=rngs)
        self.attention_norm1, self.ffn_norm1, self.attention_norm2, self.ffn_norm2 = (
            nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs) for _ in range(4)
        )
        if modulation:
            self.adaLN_modulation = nnx.List([Linear(config.time_dim, 4 * config.dim, rngs=rngs)])

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "#b t half"],
        lengths: Int[Array, " b"] | None = None,
        conditioning: Float[Array, "b e"] | None = None,
    ) -> Float[Array, "b t d"]:
        if conditioning is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), angles, lengths))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        vectors = self.adaLN_modulation[0](conditioning)[:, None]
        scale, gate, scale_mlp, gate_mlp = jnp.split(vectors, 4, axis=-1)
        attended = self.attention(self.attention_norm1(x) * (1 + scale), angles, lengths)
        x = x + jnp.tanh(gate) * self.attention_norm2(attended)
        hidden = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return x + jnp.tanh(gate_mlp) * self.ffn_norm2(hidden)


class FinalLayer(nnx.Module):
    """Norm, scale by the timestep, and map tokens to patches."""

    def __init__(self, config: ZImageTransformer2DConfig, *, rngs: nnx.Rngs):
        self.norm_final = LayerNorm(
            config.dim, epsilon=_FINAL_EPS, use_scale=False, use_bias=False, rngs=rngs
        )
        self.linear = Linear(config.dim, _patch_width(config), rngs=rngs)
        self.adaLN_modulation = nnx.List(
            [Placeholder(), Linear(config.time_dim, config.dim, rngs=rngs)]
        )

    def __call__(
        self, x: Float[Array, "b t d"], conditioning: Float[Array, "b e"]
    ) -> Float[Array, "b t p"]:
        scale = 1 + self.adaLN_modulation[1](jax.nn.silu(conditioning))
        return self.linear(self.norm_final(x) * scale[:, None])


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, use_bias=False, rngs=rngs)


def _patch_width(config: ZImageTransformer2DConfig) -> int:
    return config.patch_size**2 * config.in_channels


class ZImageTransformer2DModel(nnx.Module):
    """Predict image - noise (in latents) from noisy latents: the velocity, backwards."""

    def __init__(self, config: ZImageTransformer2DConfig, *, rngs: nnx.Rngs):
        self.config = config
        size = f"{config.patch_size}-1"  # patches of an image are one frame deep
        self.all_x_embedder = nnx.Dict({size: Linear(_patch_width(config), config.dim, rngs=rngs)})
        self.all_final_layer = nnx.Dict({size: FinalLayer(config, rngs=rngs)})

        def blocks(count: int, modulation: bool):
            return nnx.List(
                [
                    ZImageTransformerBlock(config, modulation=modulation, rngs=rngs)
                    for _ in range(count)
                ]
            )

        self.noise_refiner = blocks(config.n_refiner_layers, True)
        self.context_refiner = blocks(config.n_refiner_layers, False)
        self.t_embedder = TimestepEmbedder(config, rngs=rngs)
        self.cap_embedder = nnx.List(
            [
                nnx.RMSNorm(config.cap_feat_dim, epsilon=config.norm_eps, rngs=rngs),
                Linear(config.cap_feat_dim, config.dim, rngs=rngs),
            ]
        )
        self.x_pad_token, self.cap_pad_token = (
            nnx.Param(jnp.zeros((1, config.dim))) for _ in range(2)
        )
        self.layers = blocks(config.n_layers, True)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        times: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s e"],
        prompt_lengths: Int[Array, " b"],
    ) -> Float[Array, "b h w c"]:
        """Return image - noise at `times`, which run from 0 (noise) to 1 (image).

        Of `prompt_embeds` only the first `prompt_lengths` rows of each sample are read.
        """
        tokens, conditioning = self._transform(
            latents, times, prompt_embeds, prompt_lengths, self.config.n_layers
        )
        b, h, w, width = tokens.shape
        (final,) = self.all_final_layer.values()
        patch = self.config.patch_size
        patches = final(tokens.reshape(b, h * w, width), conditioning)
        patches = patches.reshape(b, h, w, patch, patch, -1)
        return patches.swapaxes(2, 3).reshape(latents.shape)

    def mid_features(
        self,
        latents: Float[Array, "b h w c"],
        times: Float[Array, " b"],
        prompt_embeds: Float[Array, "b s e"],
        prompt_lengths: Int[Array, " b"],
    ) -> Float[Array, "b hm wm cm"]:
        """Return the image's tokens after half of the joint layers, as a map of features."""
        half = (self.config.n_layers + 1) // 2
        return self._transform(latents, times, prompt_embeds, prompt_lengths, half)[0]

    def _transform(self, latents, times, prompt_embeds, prompt_lengths, layers: int):
        conditioning = self.t_embedder(times * self.config.t_scale)
        x, (h, w) = self._embed_image(latents)
        caption = self._embed_caption(prompt_embeds, prompt_lengths)
        filled = -(-prompt_lengths // MULTIPLE) * MULTIPLE
        of_image, of_caption = self._angles(filled, (h, w), caption.shape[1])
        of_image = jnp.pad(of_image, ((0, 0), (0, x.shape[1] - h * w), (0, 0)))  # pads do not turn
        angles = jnp.concatenate(
            [of_image, jnp.broadcast_to(of_caption, (len(x), *of_caption.shape[1:]))], axis=1
        )
        lengths = x.shape[1] + filled

        x = repeat(self.noise_refiner, lambda block, x: block(x, of_image, None, conditioning), x)
        caption = repeat(
            self.context_refiner, lambda block, x: block(x, of_caption, filled), caption
        )
        x = repeat(
            list(self.layers)[:layers],
            lambda block, x: block(x, angles, lengths, conditioning),
            jnp.concatenate([x, caption], axis=1),
        )
        return x[:, : h * w].reshape(len(x), h, w, -1), conditioning

    def _embed_image(self, latents):
        b, height, width, channels = latents.shape
        patch = self.config.patch_size
        h, w = height // patch, width // patch
        patches = latents.reshape(b, h, patch, w, patch, channels).swapaxes(2, 3)
        (embedder,) = self.all_x_embedder.values()
        tokens = embedder(patches.reshape(b, h * w, -1))
        return _fill_up(tokens, self.x_pad_token.get_value()), (h, w)

    def _embed_caption(self, prompt_embeds, prompt_lengths):
        norm, linear = self.cap_embedder
        pad = self.cap_pad_token.get_value()
        tokens = linear(norm(prompt_embeds))
        is_text = jnp.arange(tokens.shape[1])[None] < prompt_lengths[:, None]
        return _fill_up(jnp.where(is_text[..., None], tokens, pad.astype(tokens.dtype)[None]), pad)

    def _angles(self, filled, size: tuple[int, int], captions: int):
        """Return the angles of the image's tokens [B, h w, C / 2] and the caption's [1, T, C / 2].

        A caption's tokens, pads too, are at (1, 0, 0), (2, 0, 0), ...; the image's are at (n, row,
        column), where n is the next number after the sample's own caption.
        """
        config = self.config
        for axis, count in enumerate((captions + 2, *size)):
            if count > config.axes_lens[axis]:
                raise InputError(
                    f"{size[0]} x {size[1]} patches and a caption of {captions} are too many "
                    f"tokens for the transformer: its axes_lens are {list(config.axes_lens)}"
                )
        places, rows, columns = (
            jnp.asarray(rotary_angles(np.arange(count), channels, config.rope_theta, np.float64))
            for count, channels in zip((captions + 2, *size), config.axes_dims, strict=True)
        )
        still = rows.shape[1] + columns.shape[1]
        caption = jnp.pad(places[1:-1], ((0, 0), (0, still)))
        parts = (places[filled + 1][:, None, None], rows[None, :, None], columns[None, None])
        shape = (len(filled), *size)
        image = jnp.concatenate(
            [jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in parts], axis=-1
        )
        return image.reshape(len(filled), size[0] * size[1], -1), caption[None]


def _fill_up(tokens: Float[Array, "b t d"], pad: Float[Array, "1 d"]) -> Float[Array, "b t2 d"]:
    """Append pad tokens up to a multiple of 32."""
    b, count, width = tokens.shape
    pads = jnp.broadcast_to(pad.astype(tokens.dtype), (b, -count % MULTIPLE, width))
    return jnp.concatenate([tokens, pads], axis=1)
