"""The vision tower of Qwen2-VL: patches with 2-D rope, four of which become one token.

It mirrors transformers `models/qwen2_vl/modeling_qwen2_vl.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from r0_jax.models import config as configs
from r0_jax.models.activations import ACTIVATIONS
from r0_jax.models.attention import Placeholder, join_heads, split_heads
from r0_jax.models.attention_backend import attend
from r0_jax.models.embeddings import rotary_angles, rotate_halves
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.normalization import LayerNorm
from r0_jax.models.repeat import repeat

_EPS, _THETA = 1e-6, 10000.0
_ONLY = {
    "hidden_act": ("quick_gelu",),
    "in_channels": (3,),
    "in_chans": (3,),
    "patch_size": (14,),  # `rewards.preprocess` makes sides that are multiples of 28
    "spatial_merge_size": (2,),
    "temporal_patch_size": (2,),
}


@dataclasses.dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """Mirror the fields and defaults of transformers' `Qwen2VLVisionConfig`."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584  # of the tokens that it gives to the language model
    num_heads: int = 16
    mlp_ratio: int = 4
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Qwen2VLVisionConfig":
        """Parse the published `vision_config`; raise InputError for what is not supported."""
        return configs.parse_transformers(cls, fields, only=_ONLY)


class PatchEmbed(nnx.Module):
    """Embed patches. The file's convolution sees two frames of a video: here, the image twice."""

    def __init__(self, config: Qwen2VLVisionConfig, *, rngs: nnx.Rngs):
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = Conv(3, config.embed_dim, kernel_size=size, use_bias=False, rngs=rngs)

    def __call__(self, patches: Float[Array, "b n p p 3"]) -> Float[Array, "b n c"]:
        kernel = self.proj.kernel.get_value()
        kernel = jnp.sum(kernel, axis=0, dtype=jnp.float32).astype(kernel.dtype)
        return jnp.einsum("bnyxi,yxio->bno", patches, kernel)


class VisionAttention(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], angles: Float[Array, "1 n half"]
    ) -> Float[Array, "b n c"]:
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        query, key, value = (split_heads(part, self.heads) for part in parts)
        query, key = rotate_halves(query, angles), rotate_halves(key, angles)
        return self.proj(join_heads(attend(query, key, value)))


class VisionMLP(nnx.Module):
    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, inner, rngs=rngs)
        self.fc2 = Linear(inner, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.fc2(ACTIVATIONS["quick_gelu"](self.fc1(x)))


class VisionBlock(nnx.Module):
    def __init__(self, config: Qwen2VLVisionConfig, *, rngs: nnx.Rngs):
        width = config.embed_dim
        self.norm1 = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.norm2 = LayerNorm(width, epsilon=_EPS, rngs=rngs)
        self.attn = VisionAttention(width, config.num_heads, rngs=rngs)
        self.mlp = VisionMLP(width, config.mlp_ratio * width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], angles: Float[Array, "1 n half"]
    ) -> Float[Array, "b n c"]:
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Make one token of a square of neighbouring patches."""

    def __init__(self, config: Qwen2VLVisionConfig, *, rngs: nnx.Rngs):
        self.patches = config.spatial_merge_size**2
        inner = self.patches * config.embed_dim
        self.ln_q = LayerNorm(config.embed_dim, epsilon=_EPS, rngs=rngs)
        self.mlp = nnx.List(
            [
                Linear(inner, inner, rngs=rngs),
                Placeholder(),
                Linear(inner, config.hidden_size, rngs=rngs),
            ]
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b t d"]:
        x = self.ln_q(x).reshape(len(x), -1, self.patches * x.shape[-1])
        return self.mlp[2](jax.nn.gelu(self.mlp[0](x), approximate=False))


class Qwen2VisionTransformer(nnx.Module):
    def __init__(self, config: Qwen2VLVisionConfig, *, rngs: nnx.Rngs):
        self.patch, self.merge = config.patch_size, config.spatial_merge_size
        self.head_dim = config.embed_dim // config.num_heads
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = nnx.List([VisionBlock(config, rngs=rngs) for _ in range(config.depth)])
        self.merger = PatchMerger(config, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        """Return the tokens of normalized images, row by row; all patches see each other.

        Sides are multiples of patch_size * spatial_merge_size.
        """
        patch, merge = self.patch, self.merge
        rows, columns = (side // (patch * merge) for side in images.shape[1:3])
        # Patches that become one token are neighbours in the sequence.
        patches = images.reshape(-1, rows, merge, patch, columns, merge, patch, 3)
        patches = patches.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(
            len(images), -1, patch, patch, 3
        )
        angles = jnp.asarray(self._angles(rows, columns)[None])
        x = repeat(self.blocks, lambda block, x: block(x, angles), self.patch_embed(patches))
        return self.merger(x)

    def _angles(self, rows: int, columns: int) -> Float[np.ndarray, "n half"]:
        """Return the angles of 2-D positions: half of a head's pairs turn by y, half by x."""
        merge = self.merge
        grid = np.indices((rows * merge, columns * merge))  # [2, rows, columns]
        grid = grid.reshape(2, rows, merge, columns, merge).transpose(1, 3, 2, 4, 0)
        angles = rotary_angles(grid.reshape(-1, 2), self.head_dim // 2, _THETA)
        return angles.reshape(len(angles), -1)
