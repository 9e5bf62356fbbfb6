"""safetensors files, read in pieces and written one tensor at a time.

The safetensors library checks a file's header. But its readers return whole copies, and its writer
needs all tensors at once. Those of a full-size network are more than a host has.
"""

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from r0_jax.errors import InputError
from r0_jax.files import begin, check_not_pointer, check_regular, holding

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Code in the header -> dtype, for those that NumPy has.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": _BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """Say where a tensor lies; NumPy may not know its `dtype`, a name such as float8_e4m3fn."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class TensorFile:
    """Hold an open safetensors file: its `tensors` by their keys, and its text `metadata`.

    It is read by position and not mapped. The pages of a mapping count as memory of the process
    for as long as it lasts. A mapped file that is cut short kills the process.
    Raises InputError for a file that is missing, cut short, or something else.
    """

    def __init__(self, path: Path):
        self.path = path
        check_regular(path)
        try:
            with safe_open(path, framework="numpy"):  # checks every field and offset
                pass
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise InputError(f"{path} is missing") from None
        except (SafetensorError, OSError) as e:
            check_not_pointer(path)
            raise self._incomplete(str(e)) from None
        weakref.finalize(self, os.close, self._file)
        size = int.from_bytes(self._read_bytes(np.empty(8, np.uint8), 0), "little")
        header = json.loads(self._read_bytes(np.empty(size, np.uint8), 8).tobytes())
        self.metadata: dict[str, str] = header.get("__metadata__", {})
        self.tensors = {
            key: Stored(
                _name(entry["dtype"]), tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            )
            for key, entry in header.items()
            if key != "__metadata__"
        }

    def read(self, key: str) -> Shaped[np.ndarray, "..."]:
        """Return a tensor as it is stored; raise InputError where NumPy lacks its dtype."""
        result = np.empty(self.tensors[key].shape, self.dtype(key))
        self.read_into(result, key)
        return result

    def dtype(self, key: str) -> np.dtype:
        """Return a tensor's dtype; raise InputError where NumPy lacks it."""
        name = self.tensors[key].dtype
        try:
            return _BFLOAT16 if name == "bfloat16" else np.dtype(name)
        except TypeError:
            raise InputError(f"{self.path}: {key} holds {name}, which is not supported") from None

    def read_into(self, out: Shaped[np.ndarray, "..."], key: str, first: int = 0) -> None:
        """Fill `out` with a tensor's elements from number `first` on, in row-major order.

        `out` is contiguous and has the tensor's dtype.
        """
        self._read_bytes(
            out.reshape(-1).view(np.uint8), self.tensors[key].start + first * out.dtype.itemsize
        )

    def _read_bytes(self, out: np.ndarray, start: int) -> np.ndarray:
        done = 0
        while done < len(out):  # Linux reads at most 2 GB at once
            try:
                count = os.preadv(self._file, [out[done:].data], start + done)
            except OSError as e:
                raise self._incomplete(e.strerror) from None
            if not count:
                raise self._incomplete("it ends too early")
            done += count
        return out

    def _incomplete(self, reason: str) -> InputError:
        return InputError(
            f"{self.path} is not a complete safetensors file ({reason}): download it again"
        )


def _name(code: str) -> str:
    """Return the dtype of a code: "float16" for F16, "float8_e4m3fn" for F8_E4M3."""
    if code in _DTYPES:
        return _DTYPES[code].name
    name = code.lower().replace("f", "float", 1)
    return name + "fn" if name == "float8_e4m3" else name


class Tensor(NamedTuple):
    """Describe a tensor to write; `value` makes its array, of this shape and dtype, when it is due.

    None stands for zeros, which take no room on disk.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], Shaped[np.ndarray, "..."]] | None

    @property
    def size(self) -> int:
        """Return its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, one tensor at a time, in the order of `tensors`.

    The widest dtype comes first, which keeps all of them aligned. Raises InputError where the disk
    has no room or cannot be written to.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key, shape, dtype, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = begin(path)
    try:
        file = open(temporary, "xb")
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e.strerror}") from None
    try:
        with file, holding(temporary):
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                if tensor.value is None:
                    file.truncate(file.seek(tensor.size, os.SEEK_CUR))
                    continue
                value = np.ascontiguousarray(tensor.value())
                if (value.dtype, value.size) != (tensor.dtype, math.prod(tensor.shape)):
                    raise ValueError(
                        f"{tensor.key} is {value.dtype}{value.shape}, announced were "
                        f"{tensor.dtype}{tensor.shape}"
                    )
                file.write(value.reshape(-1).view(np.uint8).data)
            os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise InputError(
                f"{path} cannot be written ({e.strerror}): is the disk full?"
            ) from None
        raise
