"""Single-file checkpoints rewritten plainly: fp8 weights times their scales, EMA as weights."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from r0_jax.errors import InputError
from r0_jax.weights import tensor_file
from r0_jax.weights.tensor_file import Tensor, TensorFile

_NETWORK = "model.diffusion_model."
_SCALES = (".scale_weight", ".weight_scale")  # of <layer>.weight
# Endings of keys that say how a runtime multiplies, and hold no weights.
_HINTS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_FP8 = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")}


def is_weight(key: str) -> bool:
    """Return whether a key holds no scale and no hint of quantized weights."""
    return not key.endswith((*_SCALES, *_HINTS))


def has_ema(file: TensorFile) -> bool:
    """Return whether EMA weights lie beside those of the network."""
    return any(_ema_key(key) in file.tensors for key in file.tensors if key.startswith(_NETWORK))


def needs_rewrite(file: TensorFile) -> bool:
    """Return whether the values of some weights are products with a scale.

    Raise InputError for quantized weights of another kind.
    """
    for key in file.tensors:
        if key.endswith((".weight_scale_2", ".qweight", ".absmax")):
            raise _unsupported(file, key)
        if key.endswith(".comfy_quant") and "float8" not in _format_of(file, key):
            raise _unsupported(file, key)
    return not all(map(is_weight, file.tensors))


def rewrite(file: TensorFile, target: Path, dtype: np.dtype, ema: bool = False) -> None:
    """Write the file's tensors, with scales applied; with `ema`, EMA replaces the network's.

    The product of weight and scale is that of float32, rounded to `dtype` once.
    Raise InputError if a scale does not fit, or if EMA weights are missing.
    """
    stored, scales = file.tensors, {}
    for key in stored:
        if layer := next((key.removesuffix(end) for end in _SCALES if key.endswith(end)), None):
            if (weight := f"{layer}.weight") not in stored:
                raise InputError(f"{file.path}: {key} is a scale without {weight}")
            if stored[weight].dtype not in _FP8:
                raise _unsupported(file, weight)
            scales[weight] = key
    tensors = []
    for key, (name, shape, _) in stored.items():
        if not is_weight(key):
            continue
        source = key
        if ema and key.startswith("model_ema."):
            continue
        if ema and key.startswith(_NETWORK):
            source = _ema_key(key)
            if source not in stored or stored[source].shape != shape:
                raise InputError(f"{file.path} has no EMA weights of {key}: leave --ema out")
            name = stored[source].dtype
        if key in scales and source == key:
            value = _scaled(file, key, scales[key], dtype)
        elif name in _FP8:
            value = _cast(file, source, dtype)
        else:
            value = _plain(file, source)
        kept = dtype if name in _FP8 else file.dtype(source)
        tensors.append(Tensor(key, shape, kept, value))
    tensor_file.write(target, tensors)


def _ema_key(key: str) -> str:
    """Return the name of a weight's EMA: that of its buffer in CompVis' LitEma."""
    return "model_ema." + "".join(key.split(".")[1:])


def _read(file: TensorFile, key: str) -> Shaped[np.ndarray, "..."]:
    """Return a tensor, of fp8 too."""
    name = file.tensors[key].dtype
    if name not in _FP8:
        return file.read(key)
    result = np.empty(file.tensors[key].shape, _FP8[name])
    file.read_into(result, key)
    return result


def _scaled(file: TensorFile, key: str, scale: str, dtype: np.dtype) -> Callable[[], np.ndarray]:
    shape = file.tensors[key].shape
    factor = file.read(scale).astype(np.float32).reshape(-1)
    if factor.size not in (1, shape[0]):
        raise _unsupported(file, scale)
    factor = factor.reshape(-1, *[1] * (len(shape) - 1))  # one, or one per row
    return lambda: (_read(file, key).astype(np.float32) * factor).astype(dtype)


def _cast(file: TensorFile, key: str, dtype: np.dtype) -> Callable[[], np.ndarray]:
    return lambda: _read(file, key).astype(np.float32).astype(dtype)


def _plain(file: TensorFile, key: str) -> Callable[[], np.ndarray]:
    return lambda: file.read(key)


def _format_of(file: TensorFile, key: str) -> str:
    """Return the format that a layer's JSON names."""
    try:
        return str(json.loads(file.read(key).tobytes()).get("format"))
    except (ValueError, AttributeError):
        return ""


def _unsupported(file: TensorFile, key: str) -> InputError:
    return InputError(
        f"{file.path} holds quantized weights that are not supported ({key}): "
        "get the checkpoint in float16, bfloat16 or fp8"
    )
