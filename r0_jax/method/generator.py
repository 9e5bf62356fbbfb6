"""The trained network: the pretrained one with adapters, or with other weights."""

import dataclasses

import jax
import jax.numpy as jnp

from r0_jax.method import lora, stacks
from r0_jax.weights.network import Params, Shapes


@dataclasses.dataclass(frozen=True)
class Generator:
    """Turn trainable parameters into network weights.

    Attributes:
      rank: of the adapters; 0 trains every weight.
      alpha: adapters are scaled by alpha / rank.
      targets: regex on dotted module names; those that match get an adapter.
      dtype: what the network computes in; trainable parameters stay float32.
      fixed: parameters of the network that are never trained.
    """

    rank: int
    alpha: float
    targets: str
    dtype: str = "float32"
    fixed: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init(self, key: jax.Array, base: Params, shapes: Shapes) -> Params:
        """Return trainable parameters, float32, with which the generator equals the base."""
        if self.rank:
            return lora.init(key, shapes, self.targets, self.rank)
        return {
            name: jnp.array(value, jnp.float32)
            for name, value in base.items()
            if name not in self.fixed
        }

    def weights(self, params: Params, base: Params) -> Params:
        """Return the network's weights in `dtype`, differentiable in `params`.

        Kernels with an adapter are `Adapted`. `params` may be packed (stacks.py).
        """
        weights = (
            lora.adapt(base, params, self.scale) if self.rank else base | stacks.unpack(params)
        )
        return jax.tree.map(lambda value: value.astype(self.dtype), weights)

    def base_weights(self, params: Params, base: Params) -> Params:
        """Return the pretrained weights in the form that `weights` gives them.

        So one compiled program draws with both.
        """
        if not self.rank:
            return {name: value.astype(self.dtype) for name, value in base.items()}
        return self.weights(self.toward_base(params, base, jnp.float32(1)), base)

    def toward_base(self, params: Params, base: Params, share: jax.Array) -> Params:
        """Return the parameters after a pull to the pretrained weights, which may be packed.

        A share of theta - theta_pretrained is taken away. Of adapters that is a share of A B, and
        it is taken from B.
        """
        if self.rank:
            return {
                name: value * (1 - share) if name.endswith(".lora_B.kernel") else value
                for name, value in params.items()
            }

        def pretrained(name: str, value: jax.Array) -> jax.Array:
            found = (
                jnp.stack([base[one] for one in stacks.members(name, len(value))])
                if "*" in name
                else base[name]
            )
            return found.astype(value.dtype)

        return {
            name: value - share * (value - pretrained(name, value))
            for name, value in params.items()
        }

    def squared_distance(self, params: Params, base: Params) -> jax.Array:
        """Return ||theta - theta_pretrained||^2, the sum over all weights, in float32."""
        if self.rank:
            return lora.squared_norm(params, self.scale)
        return sum(
            jnp.sum((value - base[name].astype(jnp.float32)) ** 2)
            for name, value in stacks.unpack(params).items()
        )
