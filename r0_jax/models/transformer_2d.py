"""Spatial transformer of the UNet: diffusers `models/transformers/transformer_2d.py`."""

from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models.attention import Attention, FeedForward


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; pre-norm residuals."""

    def __init__(self, channels: int, heads: int, cross_attention_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(channels, heads, rngs=rngs)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(channels, heads, cross_attention_dim=cross_attention_dim, rngs=rngs)
        self.norm3 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.ff = FeedForward(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"],
                 prompt_embeds: Float[Array, "b s d"]) -> Float[Array, "b t c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), prompt_embeds)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """`depth` transformer blocks over the pixels of a feature map, with a residual around them."""

    def __init__(self, channels: int, heads: int, depth: int, cross_attention_dim: int, *,
                 norm_num_groups: int, use_linear_projection: bool, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(channels, num_groups=norm_num_groups, epsilon=1e-6, rngs=rngs)

        def projection():
            if use_linear_projection:
                return nnx.Linear(channels, channels, rngs=rngs)
            return nnx.Conv(channels, channels, kernel_size=(1, 1), rngs=rngs)

        self.proj_in = projection()
        self.transformer_blocks = nnx.List([
            BasicTransformerBlock(channels, heads, cross_attention_dim, rngs=rngs)
            for _ in range(depth)])
        self.proj_out = projection()

    def __call__(self, x: Float[Array, "b h w c"],
                 prompt_embeds: Float[Array, "b s d"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        hidden = self.proj_in(self.norm(x)).reshape(b, h * w, c)  # [B, H W, C]
        for block in self.transformer_blocks:
            hidden = block(hidden, prompt_embeds)
        return x + self.proj_out(hidden.reshape(b, h, w, c))
