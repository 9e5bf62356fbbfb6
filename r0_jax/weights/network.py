"""An nnx.Module as a pure function over a flat dict of parameters.

Everything outside `models/` sees a network as `network(params, *args)`. `params` is a flat
`dict[str, Array]` with the dotted names of the checkpoint file
("down_blocks.0.resnets.1.conv1.kernel") as keys. Sharding rules, LoRA, EMA, weight penalties,
checkpoints and export all speak that one language.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from r0_jax.errors import InputError
from r0_jax.models import attention_backend
from r0_jax.models.linear import Adapted
from r0_jax.weights.lazy import Lazy
from r0_jax.weights.tensor_file import TensorFile

# NumPy or Lazy while they are not on devices; only Lazy may be larger than the host's memory.
Params = dict[str, jax.Array | np.ndarray | Lazy | Adapted]
Shapes = dict[str, jax.ShapeDtypeStruct]
_MOST = 20_000  # parameters of a network that no file backs up; SDXL's UNet has 1,680
_SPARE = 100  # a network may draw a few keys more than its files have tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Hold the graph of a module without its arrays.

    Attributes:
      graphdef: the module's structure; static, so jitted functions may close over it.
      shapes: shape and dtype of every parameter, keyed by dotted name in JAX layout.
      config: the parsed config that the module was built from.
      attention: what computes its attention.
      heads: number of heads of each module that attends, by its dotted name.
    """

    graphdef: nnx.GraphDef
    shapes: Shapes
    config: Any
    attention: attention_backend.Backend = attention_backend.XLA
    heads: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def abstract(
        cls, constructor: Callable[[nnx.Rngs], nnx.Module], stored: int | None = None
    ) -> "Network":
        """Build the graph without allocating a weight.

        Raise InputError for a config that asks for many more parameters than the tensors that are
        `stored`, where that is known: building them would take hours.
        """
        most = _MOST if stored is None else 2 * stored + _SPARE
        module = nnx.eval_shape(lambda: constructor(_Rngs(jax.random.key(0), most)))
        graphdef, state = nnx.split(module)
        shapes = {_name(path): _struct(leaf) for path, leaf in nnx.to_flat_state(state)}
        heads = {
            _name(path): part.heads
            for path, part in nnx.iter_modules(module)
            if hasattr(part, "heads")
        }
        return cls(graphdef, shapes, module.config, heads=heads)

    def __call__(self, params: Mapping[str, jax.Array | np.ndarray | Adapted], *args, **kwargs):
        """Apply the module's `__call__`."""
        return self.apply(params, "__call__", *args, **kwargs)

    def apply(
        self, params: Mapping[str, jax.Array | np.ndarray | Adapted], method: str, *args, **kwargs
    ):
        """Apply any method of the module; it computes in the dtype of the parameters."""
        if params.keys() != self.shapes.keys():  # nnx.merge would pair them by position
            wrong = sorted(params.keys() ^ self.shapes.keys())
            raise ValueError(f"missing or left over parameters: {', '.join(wrong[:4])}")
        state = nnx.from_flat_state({_path(name): nnx.Param(x) for name, x in params.items()})
        with attention_backend.use(self.attention):
            return getattr(nnx.merge(self.graphdef, state), method)(*args, **kwargs)


def stored_in(files: Iterable[Path]) -> int | None:
    """Return how many tensors safetensors files hold; None without files, or if one is damaged.

    Who reads the weights says what is damaged: what does not fit is said before.
    """
    try:
        counts = [len(TensorFile(file).tensors) for file in files]
    except InputError:
        return None
    return sum(counts) if counts else None


def init(constructor: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    """Return freshly initialized parameters of a module, flat."""
    # Not jitted: one program of some hundred random draws takes XLA minutes to compile.
    state = nnx.state(constructor(_Rngs(key)))
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


class _Rngs(nnx.Rngs):
    """Give the keys of `nnx.Rngs(key)`, counted in Python.

    nnx counts in a traced array, and each count searches all that was traced before it. So building
    SDXL's UNet would take a minute.
    """

    def __init__(self, key: jax.Array, most: int | None = None):
        super().__init__()
        self.key, self.drawn, self.most = key, 0, most

    def params(self) -> jax.Array:
        self.drawn += 1
        if self.most is not None and self.drawn > self.most:
            raise InputError(
                f"the config asks for more than {self.most} tensors, many more than there are: it "
                "belongs to another model, or is damaged"
            )
        return jax.random.fold_in(self.key, self.drawn - 1)


def fingerprint(params: Params) -> str:
    """Return 16 hexadecimal digits of weights, the same in float32, float16 and bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(params):
        values = np.asarray(params[name])
        some = values.reshape(-1)[:: max(1, values.size // 256)]  # some of the gigabytes are enough
        digest.update(f"{name} {values.shape}".encode())
        digest.update(some.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def row_fingerprint(params: Params) -> str:
    """Return 16 hexadecimal digits of weights in files, of which little is read.

    It covers all names and shapes, and of each tensor one row in the middle, in bfloat16: any
    `dtype` that the weights were opened in gives the same.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        leaf = params[name].astype(np.float32)
        index = [slice(None)] * len(leaf.shape)
        if index:  # a row of the file, which has a kernel's last axis first
            axis = -1 if name.endswith("kernel") else 0
            index[axis] = slice(leaf.shape[axis] // 2, leaf.shape[axis] // 2 + 1)
        digest.update(f"{name} {leaf.shape}".encode())
        digest.update(leaf[tuple(index)].astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple:
    # List indices are integers in nnx paths, and no attribute of a module is called by a number.
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _struct(leaf) -> jax.ShapeDtypeStruct:
    value = leaf.get_value()
    return jax.ShapeDtypeStruct(value.shape, value.dtype)
