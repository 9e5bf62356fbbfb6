"""The UNet's spatial transformer: diffusers `models/transformers/transformer_2d.py`."""

from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models.attention import Attention, FeedForward
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import GroupNorm, LayerNorm
from r0_jax.models.repeat import repeat


class BasicTransformerBlock(nnx.Module):
    """Apply self-attention, cross-attention to the prompt and a feed-forward, with residuals.

    Each follows a norm. With `only_cross_attention` the first one attends to the prompt as well.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        cross_attention_dim: int,
        *,
        only_cross_attention: bool = False,
        rngs: nnx.Rngs,
    ):
        self.only_cross_attention = only_cross_attention
        self.norm1 = LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(
            channels,
            heads,
            cross_attention_dim=cross_attention_dim if only_cross_attention else None,
            rngs=rngs,
        )
        self.norm2 = LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(channels, heads, cross_attention_dim=cross_attention_dim, rngs=rngs)
        self.norm3 = LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.ff = FeedForward(channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t c"], prompt_embeds: Float[Array, "b s d"]
    ) -> Float[Array, "b t c"]:
        x = x + self.attn1(self.norm1(x), prompt_embeds if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), prompt_embeds)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Apply `depth` transformer blocks to the pixels of a feature map, and add a residual."""

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        cross_attention_dim: int,
        *,
        norm_num_groups: int,
        use_linear_projection: bool,
        only_cross_attention: bool = False,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, num_groups=norm_num_groups, epsilon=1e-6, rngs=rngs)
        inner = heads * (channels // heads)  # smaller where the heads do not divide the channels

        def projection(inputs: int, outputs: int):
            if use_linear_projection:
                return Linear(inputs, outputs, rngs=rngs)
            return Conv(inputs, outputs, kernel_size=(1, 1), rngs=rngs)

        self.proj_in = projection(channels, inner)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    inner,
                    heads,
                    cross_attention_dim,
                    only_cross_attention=only_cross_attention,
                    rngs=rngs,
                )
                for _ in range(depth)
            ]
        )
        self.proj_out = projection(inner, channels)

    def __call__(
        self, x: Float[Array, "b h w c"], prompt_embeds: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, _ = x.shape
        hidden = self.proj_in(self.norm(x)).reshape(b, h * w, -1)  # [B, H W, C]
        hidden = repeat(self.transformer_blocks, lambda block, x: block(x, prompt_embeds), hidden)
        return x + self.proj_out(hidden.reshape(b, h, w, -1))
