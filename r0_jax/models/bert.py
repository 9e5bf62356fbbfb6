"""BERT as an encoder: transformers `models/bert/modeling_bert.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import dot_product_attention
from r0_jax.models.embeddings import embed
from r0_jax.models.linear import Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat

# Other types may count positions in another way (roberta: from pad_token_id + 1).
_ONLY = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Mirror the fields and defaults of transformers' `BertConfig`."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "BertConfig":
        """Parse a published `config.json`; raise InputError for what is not supported."""
        config = configs.parse_transformers(cls, fields, only=_ONLY)
        configs.check_layers(config)
        return config


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class BertEmbeddings(nnx.Module):
    """Embed tokens and positions and, unless `token_types` is False (BLIP), their types."""

    def __init__(self, config: BertConfig, *, token_types: bool = True, rngs: nnx.Rngs):
        width, self.token_types = config.hidden_size, token_types
        self.word_embeddings = embed(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = embed(config.max_position_embeddings, width, rngs=rngs)
        if token_types:
            self.token_type_embeddings = embed(config.type_vocab_size, width, rngs=rngs)
        self.LayerNorm = _norm(config, rngs)

    def __call__(
        self, input_ids: Int[Array, "b t"], token_type_ids: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t c"]:
        x = self.word_embeddings(input_ids)
        if self.token_types:
            if token_type_ids is None:
                token_type_ids = jnp.zeros_like(input_ids)
            x = x + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(x + self.position_embeddings(jnp.arange(input_ids.shape[1]))[None])


class BertSelfAttention(nnx.Module):
    """Attend to the tokens or, where `context_size` is given, to a context of that width."""

    def __init__(self, config: BertConfig, *, context_size: int | None = None, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        width, context_size = config.hidden_size, context_size or config.hidden_size
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(context_size, width, rngs=rngs)
        self.value = Linear(context_size, width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "b s"] | None = None,
        context: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b t c"]:
        context = x if context is None else context
        return dot_product_attention(
            self.query(x), self.key(context), self.value(context), self.heads, mask=mask
        )


class BertOutput(nnx.Module):
    """Apply a linear layer, add the residual, and norm; this is also `BertSelfOutput`."""

    def __init__(self, inputs: int, config: BertConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(inputs, config.hidden_size, rngs=rngs)
        self.LayerNorm = _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], residual: Float[Array, "b t c"]
    ) -> Float[Array, "b t c"]:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nnx.Module):
    def __init__(self, config: BertConfig, *, context_size: int | None = None, rngs: nnx.Rngs):
        self.self = BertSelfAttention(config, context_size=context_size, rngs=rngs)
        self.output = BertOutput(config.hidden_size, config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "b s"] | None = None,
        context: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b t c"]:
        return self.output(self.self(x, mask, context), x)


class BertIntermediate(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t d"]:
        return self.activation(self.dense(x))


class BertLayer(nnx.Module):
    """Apply self-attention, cross-attention if `context_size` is given, and a feed-forward."""

    def __init__(self, config: BertConfig, *, context_size: int | None = None, rngs: nnx.Rngs):
        self.crosses = context_size is not None
        self.attention = BertAttention(config, rngs=rngs)
        if self.crosses:
            self.crossattention = BertAttention(config, context_size=context_size, rngs=rngs)
        self.intermediate = BertIntermediate(config, rngs=rngs)
        self.output = BertOutput(config.intermediate_size, config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "b t"] | None = None,
        context: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b t c"]:
        x = self.attention(x, mask)
        if self.crosses:
            x = self.crossattention(x, None, context)
        return self.output(self.intermediate(x), x)


class BertEncoder(nnx.Module):
    def __init__(self, config: BertConfig, *, context_size: int | None = None, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [
                BertLayer(config, context_size=context_size, rngs=rngs)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "b t"] | None = None,
        context: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b t c"]:
        return repeat(self.layer, lambda layer, x: layer(x, mask, context), x)


class BertPooler(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b c"]:
        return jnp.tanh(self.dense(x[:, 0]))


class BertFeatures(NamedTuple):
    """Hold all tokens, and the first one after the pooler, if there is a pooler."""

    last_hidden_state: Float[Array, "b t c"]
    pooled: Float[Array, "b c"] | None


class BertModel(nnx.Module):
    """Encode text, as Taiyi does in place of Stable Diffusion's encoder for Chinese prompts."""

    def __init__(self, config: BertConfig, *, add_pooling_layer: bool = True, rngs: nnx.Rngs):
        self.config, self.add_pooling_layer = config, add_pooling_layer
        self.embeddings = BertEmbeddings(config, rngs=rngs)
        self.encoder = BertEncoder(config, rngs=rngs)
        if add_pooling_layer:
            self.pooler = BertPooler(config, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | Bool[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
    ) -> BertFeatures:
        """Return the features; `attention_mask` is 0 at pads.

        Without a mask tokens attend to pads as well, as in Taiyi.
        """
        mask = None if attention_mask is None else attention_mask != 0
        hidden = self.encoder(self.embeddings(input_ids, token_type_ids), mask)
        return BertFeatures(hidden, self.pooler(hidden) if self.add_pooling_layer else None)
