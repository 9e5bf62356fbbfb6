"""A torch module against its JAX twin with the same weights, forward and backward, in float32."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load_file

from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, Shapes

# Relative to the largest element. Ten times what rounding makes of it: at 1e-4, GELU's tanh
# approximation would pass for GELU.
OUTPUT, GRADIENT = 1e-5, 1e-4


class Measurement(NamedTuple):
    """One comparison: the largest difference as a share of the largest element."""

    test: str
    what: str
    error: float
    tolerance: float


MEASURED: list[Measurement] = []  # in this process; conftest.py writes it down


def part(constructor: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The Network of a part of a model, which unlike a whole one keeps no config."""

    def build(rngs):
        module = constructor(rngs)
        module.config = None
        return module

    return Network.abstract(build)


def params_of(module: torch.nn.Module, shapes: Shapes, prefix: str = "") -> Params:
    """The module's weights for the twin; the names must be the same, none missing or left over."""
    state = {prefix + key: value.numpy() for key, value in module.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    assert {convert.to_key(name) for name in shapes} == set(state)
    params = {name: convert.from_checkpoint(name, state[convert.to_key(name)]) for name in shapes}
    assert {name: value.shape for name, value in params.items()} == {
        name: struct.shape for name, struct in shapes.items()
    }
    return params


def assert_round_trip(params: Params, folder: Path, torch_class: type[torch.nn.Module]) -> None:
    """Asserts that these parameters, read from the folder, are written as they were, and that the
    library takes what was written for its own."""
    [path] = folder.glob("*.safetensors")
    theirs = load_file(path)
    convert.save(params, path)
    ours = load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(
        ours[key].shape == value.shape and ours[key].tobytes() == value.tobytes()
        for key, value in theirs.items()
    )
    _, info = torch_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


def quieten(module: torch.nn.Module, *names: str) -> None:
    """Makes the outputs of these submodules small, so that a wrong epsilon of the norm after
    them shows."""
    for name in names:
        for value in module.get_submodule(name).parameters():
            value.data *= 1e-3


def compare(
    ours: Callable,
    params: Params,
    theirs: Callable,
    *inputs: np.ndarray,
    output: float = OUTPUT,
    gradient: float = GRADIENT,
) -> None:
    """Asserts that all outputs agree, and their gradients with respect to each float input.

    `ours(params, *inputs)` takes and returns images as [B, H, W, C]; `theirs(*inputs)` as
    [B, C, H, W]. Both return an array or several. The gradient is of sum(output * random).
    `output` and `gradient` are the tolerances.
    """
    theirs_in = [to_torch(x).requires_grad_(x.dtype == np.float32) for x in inputs]
    expected = _flat(theirs(*theirs_in))
    random = np.random.default_rng(0)
    weights = [random.standard_normal(to_jax(x).shape, np.float32) for x in expected]
    sum((x * to_torch(w)).sum() for x, w in zip(expected, weights, strict=True)).backward()

    @jax.jit
    def run(params, inputs, weights):
        inputs = list(inputs)
        floats = [i for i, x in enumerate(inputs) if x.dtype == np.float32]

        def forward(values):
            for i, value in zip(floats, values, strict=True):
                inputs[i] = value
            return jax.tree.leaves(ours(params, *inputs))

        outputs, pull_back = jax.vjp(forward, [inputs[i] for i in floats])
        return outputs, pull_back(weights)[0]

    outputs, gradients = run(params, inputs, weights)
    assert len(outputs) == len(expected)
    for i, (found, other) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(found, to_jax(other), output, f"output {i}")
    for i, (found, x) in enumerate(
        zip(gradients, (x for x in theirs_in if x.requires_grad), strict=True)
    ):
        assert_close(found, to_jax(x.grad), gradient, f"gradient {i}")


def assert_close(ours, theirs, tolerance: float, what: str = "") -> None:
    """Asserts that the largest difference is below `tolerance` of the largest element."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0, f"{what} is zero everywhere: it would test nothing"
    error = np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    MEASURED.append(Measurement(test, what, float(error), tolerance))
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def input_dtypes(function: Callable, *args, primitives: list[str]) -> dict[str, set[str]]:
    """The dtypes that each of these JAX primitives reads anywhere in `function(*args)`."""
    found = {name: set() for name in primitives}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in found:
                found[equation.primitive.name] |= {str(x.aval.dtype) for x in equation.invars}
            for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
                if _is_jaxpr(value):
                    walk(getattr(value, "jaxpr", value))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)


def to_jax(x: torch.Tensor) -> np.ndarray:
    x = x.detach().numpy()
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _flat(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [x for output in outputs for x in _flat(output)]
