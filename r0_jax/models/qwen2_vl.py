"""Qwen2-VL, which reads an image and text: transformers `models/qwen2_vl/modeling_qwen2_vl.py`.

Here it reads one image between two pieces of text, and judges it:

    text before [T1], image [h/28 * w/28], text after [T2]  ->  state of the last token  ->  head
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
from r0_jax.models.embeddings import embed, rotary_angles, rotate_halves
from r0_jax.models.linear import Linear
from r0_jax.models.qwen2_vl_vision import Qwen2VisionTransformer, Qwen2VLVisionConfig
from r0_jax.models.repeat import repeat

# Fields of the published HPSv3: Qwen2-VL-7B with the words of its tokenizer and <|Reward|>.
HPS_V3 = {"vocab_size": 151658}


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """Hold a published `config.json`; the defaults are those of Qwen2-VL-7B-Instruct."""

    vision_config: Qwen2VLVisionConfig
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Qwen2VLConfig":
        """Parse a published file, or one of transformers 5, which nests the language model's.

        Raise InputError for what is not supported.
        """
        vision, text = fields.get("vision_config", {}), fields.get("text_config", {})
        rope = fields.get("rope_scaling") or {}
        if isinstance(text, Mapping):
            rope = text.get("rope_parameters") or text.get("rope_scaling") or rope
        if not all(isinstance(part, Mapping) for part in (vision, text, rope)):
            raise InputError(
                f"{cls.__name__}: vision_config, text_config and rope_scaling must be objects"
            )
        # A nested file repeats outside what concerns both halves, such as tied embeddings.
        text = {k: v for k, v in ({**fields, **text, **rope}).items() if k != "vision_config"}
        text["tie_word_embeddings"] = fields.get(
            "tie_word_embeddings", text.get("tie_word_embeddings", False)
        )
        config = configs.parse_transformers(
            cls,
            text | {"vision_config": Qwen2VLVisionConfig.from_json(vision)},
            only={"hidden_act": ("silu",), "use_sliding_window": (False, None)},
        )
        config._check()
        return config

    @property
    def head_dim(self) -> int:
        """Return the width of a head of the language model."""
        return self.hidden_size // self.num_attention_heads

    @property
    def pixels(self) -> int:
        """Return the side of the square of pixels that becomes one token."""
        return self.vision_config.patch_size * self.vision_config.spatial_merge_size

    def _check(self) -> None:
        name, vision = type(self).__name__, self.vision_config
        for part, width, heads in (
            (name, self.hidden_size, self.num_attention_heads),
            (type(vision).__name__, vision.embed_dim, vision.num_heads),
        ):
            if width % heads:
                raise InputError(f"{part}: {heads} heads do not divide the width {width}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{name}: num_key_value_heads = {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(
                f"{name}: mrope_section = {list(self.mrope_section)} is not supported: three "
                f"numbers are expected, whose sum is half of a head's width {self.head_dim}"
            )
        if vision.hidden_size != self.hidden_size:
            raise InputError(
                f"{name}: the image's tokens have width {vision.hidden_size}, but those of the "
                f"text {self.hidden_size}"
            )


# --- the language model ---------------------------------------------------------------------------


class Attention(nnx.Module):
    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs):
        self.query_heads = config.num_attention_heads
        self.heads = config.num_key_value_heads  # which a mesh may split, each with its queries
        width, inner = config.hidden_size, self.heads * config.head_dim
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, inner, rngs=rngs)
        self.v_proj = Linear(width, inner, rngs=rngs)
        self.o_proj = Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t c"], angles: Float[Array, "1 t half"]
    ) -> Float[Array, "b t c"]:
        query = rotate_halves(split_heads(self.q_proj(x), self.query_heads), angles)
        key = rotate_halves(split_heads(self.k_proj(x), self.heads), angles)
        value = split_heads(self.v_proj(x), self.heads)
        return self.o_proj(join_heads(attend(query, key, value, is_causal=True)))


class MLP(nnx.Module):
    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, inner, use_bias=False, rngs=rngs)
        self.up_proj = Linear(width, inner, use_bias=False, rngs=rngs)
        self.down_proj = Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def _norm(config: Qwen2VLConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)


class DecoderLayer(nnx.Module):
    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.input_layernorm = _norm(config, rngs)
        self.post_attention_layernorm = _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t c"], angles: Float[Array, "1 t half"]
    ) -> Float[Array, "b t c"]:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2VLModel(nnx.Module):
    """Read tokens from left to right."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t c"], positions: Int[np.ndarray, "3 t"]
    ) -> Float[Array, "b t c"]:
        """Return the last hidden states of embeddings; positions are (time, row, column)."""
        of_axes = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        axis = np.repeat(np.arange(3), self.config.mrope_section)  # of each pair of channels
        angles = jnp.asarray(of_axes[axis, :, np.arange(len(axis))].T[None])
        return self.norm(repeat(self.layers, lambda layer, x: layer(x, angles), x))


def text_positions(tokens: int) -> Int[np.ndarray, "3 t"]:
    """Return 0, 1, ... on all three axes: plain rope, as the published HPSv3 runs."""
    return np.broadcast_to(np.arange(tokens), (3, tokens))


def image_positions(before: int, rows: int, columns: int, after: int) -> Int[np.ndarray, "3 t"]:
    """Return mrope's positions of text, an image of rows x columns tokens, and text.

    Text counts on all axes alike. The image stays at one time, and text goes on where the image's
    longer side ends (transformers' `get_rope_index`).
    """
    image = np.stack([np.zeros((rows, columns), int), *np.indices((rows, columns))]).reshape(3, -1)
    return np.concatenate(
        [
            text_positions(before),
            before + image,
            before + max(rows, columns) + text_positions(after),
        ],
        axis=1,
    )


# --- both together, and what judges ---------------------------------------------------------------


class Qwen2VL(nnx.Module):
    """Read one image and several texts that go on after it."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.visual = Qwen2VisionTransformer(config.vision_config, rngs=rngs)
        self.model = Qwen2VLModel(config, rngs=rngs)

    def read(
        self,
        images: Float[Array, "b h w 3"],
        before: Int[np.ndarray, " s"],
        after: Int[Array, "b q t"],
        *,
        mrope: bool,
    ) -> Float[Array, "b q c"]:
        """Return the state of the last token of each of q texts under their image.

        `before` are the token ids in front of the image, the same for all; `after` those behind
        it, filled up with -1. Without `mrope` positions are 0, 1, ... on all axes.
        """
        b, q, t = after.shape
        seen = self.visual(images)
        rows, columns = (side // self.config.pixels for side in images.shape[1:3])
        tokens = jnp.concatenate(
            [
                jnp.broadcast_to(
                    self.model.embed_tokens(jnp.asarray(before)),
                    (b * q, len(before), seen.shape[-1]),
                ),
                jnp.repeat(seen, q, axis=0),
                self.model.embed_tokens(jnp.maximum(after, 0).reshape(b * q, t)),
            ],
            axis=1,
        )
        positions = (
            image_positions(len(before), rows, columns, t)
            if mrope
            else text_positions(tokens.shape[1])
        )
        states = self.model(tokens, positions)[:, -t:]
        last = jnp.sum(after >= 0, axis=-1).reshape(b * q, 1, 1) - 1
        return jnp.take_along_axis(states, last, axis=1).reshape(b, q, -1)


class HPSv3(Qwen2VL):
    """Qwen2-VL with an MLP in place of words (hpsv3 `model/qwen2vl_trainer.py`)."""

    def __init__(self, config: Qwen2VLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.rm_head = nnx.List(
            [
                Linear(config.hidden_size, 1024, rngs=rngs),
                Placeholder(),
                Placeholder(),
                Linear(1024, 16, rngs=rngs),
                Placeholder(),
                Linear(16, 2, rngs=rngs),
            ]
        )

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        before: Int[np.ndarray, " s"],
        after: Int[Array, "b t"],
    ) -> Float[Array, " b"]:
        """Return the mean of the score, in the dtype of the head; its deviation is not used."""
        x = self.read(images, before, after[:, None], mrope=False)[:, 0]
        x = x.astype(self.rm_head[0].kernel.get_value().dtype)
        x = self.rm_head[3](jax.nn.relu(self.rm_head[0](x)))
        return self.rm_head[5](jax.nn.relu(x))[:, 0]


class Qwen2VLForConditionalGeneration(Qwen2VL):
    """Qwen2-VL and its next word, of all words or of those that are asked for."""

    def __init__(self, config: Qwen2VLConfig, *, words: int | None = None, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if words or not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, words or config.vocab_size, use_bias=False, rngs=rngs
            )

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        before: Int[np.ndarray, " s"],
        after: Int[Array, "b q t"],
    ) -> Float[Array, "b q words"]:
        """Return the logits of the word after each text, in the dtype of the head."""
        x = self.read(images, before, after, mrope=True)
        return self.lm_head(x.astype(self.lm_head.kernel.get_value().dtype))
