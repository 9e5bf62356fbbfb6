"""Qwen3 (dense) as a text encoder: transformers `models/qwen3/modeling_qwen3.py`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from r0_jax.errors import InputError
from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import join_heads, split_heads
from r0_jax.models.attention_backend import attend
from r0_jax.models.embeddings import embed, rotary_angles, rotate_halves
from r0_jax.models.linear import Linear
from r0_jax.models.repeat import repeat

_ONLY = {
    "model_type": ("qwen3",),
    "attention_bias": (False,),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Mirror the fields and defaults of transformers' `Qwen3Config`."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Qwen3Config":
        """Parse a published `config.json`; raise InputError for what is not supported."""
        config = configs.parse_transformers(cls, _with_theta(fields), only=_ONLY)
        configs.check_activation(config)
        if config.num_attention_heads % config.num_key_value_heads:
            raise InputError(
                f"Qwen3Config: num_key_value_heads = {config.num_key_value_heads} does not divide "
                f"num_attention_heads = {config.num_attention_heads}"
            )
        if config.head_dim % 2:
            raise InputError(
                f"Qwen3Config: head_dim = {config.head_dim} is not supported: channels turn in "
                "pairs, so it must be even"
            )
        return config


def _with_theta(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with `rope_theta`, where transformers 5 wrote `rope_parameters`."""
    rope = fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise InputError(
            f"Qwen3Config: rope_parameters of type {kind!r} are not supported (supported: default)"
        )
    theta = rope.get("rope_theta", fields.get("rope_theta", Qwen3Config.rope_theta))
    return {**fields, "rope_theta": float(theta) if isinstance(theta, int) else theta}


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, use_bias=False, rngs=rngs)


class Qwen3Attention(nnx.Module):
    """Look back at earlier tokens; queries share keys and values, and turn with their position."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.query_heads = config.num_attention_heads
        self.heads = config.num_key_value_heads  # which a mesh may split, each with its queries
        width, head = config.hidden_size, config.head_dim
        self.q_proj = _linear(width, self.query_heads * head, rngs)
        self.k_proj, self.v_proj = (_linear(width, self.heads * head, rngs) for _ in range(2))
        self.o_proj = _linear(self.query_heads * head, width, rngs)
        self.q_norm, self.k_norm = (
            nnx.RMSNorm(head, epsilon=config.rms_norm_eps, rngs=rngs) for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "b t c"],
        angles: Float[Array, "#b t half"],
        mask: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t c"]:
        query = self.q_norm(split_heads(self.q_proj(x), self.query_heads))
        key = self.k_norm(split_heads(self.k_proj(x), self.heads))
        value = split_heads(self.v_proj(x), self.heads)
        query, key = rotate_halves(query, angles), rotate_halves(key, angles)
        return self.o_proj(join_heads(attend(query, key, value, mask=mask, is_causal=True)))


class Qwen3MLP(nnx.Module):
    """Apply a gated linear unit."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.hidden_act]
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (_linear(width, inner, rngs) for _ in range(2))
        self.down_proj = _linear(inner, width, rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Qwen3DecoderLayer(nnx.Module):
    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.self_attn = Qwen3Attention(config, rngs=rngs)
        self.mlp = Qwen3MLP(config, rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = (
            nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
            for _ in range(2)
        )

    def __call__(self, x, angles, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Stack(nnx.Module):
    """Hold what transformers calls `Qwen3Model`, whose names in published files begin "model."."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.embed_tokens = embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List(
            [Qwen3DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)


class Qwen3Model(nnx.Module):
    """Encode text, as the text encoder of Z-Image and FLUX.2-klein."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.model = Qwen3Stack(config, rngs=rngs)

    def __call__(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t c"]:
        """Return the last hidden state, normed; the mask is 0 at pads, which are on the right.

        Without a mask the states of all but the pads are the same: no token looks ahead.
        """
        (last,) = self.hidden_states(input_ids, (self.config.num_hidden_layers,), attention_mask)
        return self.model.norm(last)

    def hidden_states(
        self,
        input_ids: Int[Array, "b t"],
        layers: Sequence[int],
        attention_mask: Int[Array, "b t"] | None = None,
    ) -> list[Float[Array, "b t c"]]:
        """Return the states after so many layers, none of them normed.

        They are transformers' `hidden_states[k]`, whose last one is normed. Layers after the
        highest of `layers`, which rise, are not computed.
        """
        mask = None if attention_mask is None else attention_mask != 0
        places = np.arange(input_ids.shape[1])
        angles = jnp.asarray(
            rotary_angles(places, self.config.head_dim, self.config.rope_theta)[None]
        )

        def run(layer: nnx.Module, x: jax.Array) -> jax.Array:
            return layer(x, angles, mask)

        x, done, states = self.model.embed_tokens(input_ids), 0, []
        for stop in layers:
            x, done = repeat(list(self.model.layers)[done:stop], run, x), stop
            states.append(x)
        return states
