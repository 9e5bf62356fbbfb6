"""Linear layers and convolutions, whose kernel may have a low-rank change."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Hold a kernel W and its change A B, which is never added to it.

    A sum in bfloat16 would lose every change below 1/256 of its weight. And gradients of A and B
    alone need no matrix of W's size.

    Attributes:
      kernel: W [*window, in, out]; a linear layer has no window.
      a: A [*window, in, rank].
      b: B [*ones, rank, out], with the adapter's scale in it.
    """

    kernel: Any
    a: Any
    b: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype


class Linear(nnx.Linear):
    """Apply x W + b, or x W + (x A) B + b where the kernel is `Adapted`."""

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        kernel = self.kernel.get_value()
        if not isinstance(kernel, Adapted):
            return super().__call__(x)
        return _biased(x @ kernel.kernel + (x @ kernel.a) @ kernel.b, self.bias)


class Conv(nnx.Conv):
    """Convolve images with W, or with W and with A and then B where the kernel is `Adapted`."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.kernel.get_value()
        if not isinstance(kernel, Adapted):
            return super().__call__(x)
        change = self._convolve(x, kernel.a) @ kernel.b.reshape(kernel.b.shape[-2:])
        return _biased(self._convolve(x, kernel.kernel) + change, self.bias)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        x, kernel = self.promote_dtype((x, kernel), dtype=self.dtype)
        strides = (self.strides,) * 2 if isinstance(self.strides, int) else self.strides
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=numbers, precision=self.precision
        )


def _biased(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    if bias is None:
        return x
    return x + jnp.reshape(bias.get_value(), (1,) * (x.ndim - 1) + (-1,))
