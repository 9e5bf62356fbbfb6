"""Low-rank adapters: W + (alpha / rank) A B for the weights whose module matches a regex.

Networks compute with W, A and B (`adapt`); files of whole weights hold the sum (`merge`).

Names follow PEFT under the one conversion rule: "x.to_q.lora_A.kernel" [in, rank] is the file's
"x.to_q.lora_A.weight" [rank, in].
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from r0_jax import patterns
from r0_jax.errors import InputError
from r0_jax.method import stacks
from r0_jax.models.linear import Adapted
from r0_jax.weights.network import Params, Shapes


def targets(shapes: Shapes, pattern: str, section: str = "lora") -> list[str]:
    """Return, in order, the modules with a kernel whose whole dotted name matches the regex.

    Raises InputError where there are none, or where the regex is not valid. It names the `section`
    of the config.
    """
    modules = [name.removesuffix(".kernel") for name in shapes if name.endswith(".kernel")]
    found = patterns.matching(pattern, modules, f"{section}.targets")
    if not found:
        raise InputError(
            f"{section}.targets matches no layer of the network: {pattern!r}; "
            f"a layer is called, for example, {modules[len(modules) // 2]}"
        )
    return found


def check_rank(shapes: Shapes, pattern: str, rank: int, section: str = "lora") -> None:
    """Raise InputError where a module's matrix is too small for adapters of this rank.

    Such an adapter would hold more numbers than the weights that it stands for. The error names the
    `section` of the config.
    """
    modules = targets(shapes, pattern, section)
    kernels = {module: shapes[f"{module}.kernel"].shape for module in modules}
    most = {module: min(prod(shape[:-1]), shape[-1]) for module, shape in kernels.items()}
    module = min(most, key=most.get)
    if rank > most[module]:
        raise InputError(
            f"{section}.rank={rank} is above what fits {module}, a matrix of rank "
            f"{most[module]}: use {most[module]} at most, or exclude this layer from "
            f"{section}.targets"
        )


def init(key: Key[Array, ""], shapes: Shapes, pattern: str, rank: int) -> Params:
    """Return A ~ N(0, 1 / rank^2) and B = 0, in float32: the network starts as the base.

    A convolution's A keeps its window and B is 1 x 1, as in PEFT.
    """
    params = {}
    for i, module in enumerate(targets(shapes, pattern)):
        *window, inputs, outputs = shapes[f"{module}.kernel"].shape
        a = jax.random.normal(jax.random.fold_in(key, i), (*window, inputs, rank)) / rank
        params[f"{module}.lora_A.kernel"] = a
        params[f"{module}.lora_B.kernel"] = jnp.zeros((*(1 for _ in window), rank, outputs))
    return params


def adapt(base: Params, adapters: Params, scale: float) -> Params:
    """Return the base's parameters with an `Adapted` kernel where there is an adapter.

    The adapters of a transformer's blocks may be stacked (stacks.py).
    """
    changes = _factors(stacks.unpack(fold(adapters, scale)))
    return base | {name: Adapted(base[name], a, b) for name, a, b in changes}


def merge(base: Params, adapters: Params, scale: float) -> Params:
    """Return the base's parameters with `scale` A B added where there is an adapter."""

    def added(kernel: Any, a: Any, b: Any) -> Any:
        return (kernel + scale * (a @ b)).astype(kernel.dtype)

    return base | {name: added(base[name], a, b) for name, a, b in _factors(adapters)}


def _factors(adapters: Params) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each adapted kernel with its A and B."""
    for name, a in adapters.items():
        if name.endswith(".lora_A.kernel"):
            module = name.removesuffix(".lora_A.kernel")
            yield f"{module}.kernel", a, adapters[f"{module}.lora_B.kernel"]


def fold(adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Return the adapters with their scale in B, so that A B needs no other scale."""
    return {
        name: value * scale if name.endswith(".lora_B.kernel") else value
        for name, value in adapters.items()
    }


def squared_norm(adapters: Params, scale: float) -> Float[Array, ""]:
    """Return the sum of squares of every `scale` A B, a scalar.

    It forms none of these products: ||A B||^2 = tr(A^T A  B B^T).
    """
    total = jnp.zeros(())
    for name, a in adapters.items():
        if name.endswith(".lora_A.kernel"):
            b = adapters[name.replace(".lora_A.", ".lora_B.")]
            blocks = len(a) if "*" in name else 1
            a, b = (x.reshape(blocks, -1, x.shape[-1]) for x in (a, b))
            total += jnp.sum((a.mT @ a) * (b @ b.mT))
    return scale**2 * total


def is_adapter(params: Mapping[str, object]) -> bool:
    """Return True if the trained parameters are adapters, False if they are whole weights."""
    return any(".lora_A." in name for name in params)
