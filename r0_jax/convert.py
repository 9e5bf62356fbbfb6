"""Checkpoint files <-> flat parameters: one rule, both ways.

A module's attributes carry exactly the names of the checkpoint file, so that
  key   = dotted path with the last name `kernel | scale | embedding` -> `weight`
  value = `kernel` with its (in, out) axes moved from the last two places to (1, 0)
and everything else unchanged. Import walks the network's parameters and asks the file for each key;
export is the same walk.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r0_jax.errors import InputError
from r0_jax.network import Network, Params

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
          "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Buffers that older files hold and no network has.
_BUFFERS = ("position_ids",)
# T5's encoder reads its tokens from the table shared with the decoder: files hold one or both.
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
# Old VAE files name the mid-block attention after its first implementation.
_OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.",
              ".to_out.0.": ".proj_attn."}


def to_key(name: str) -> str:
    """The checkpoint file's key of a parameter."""
    head, _, last = name.rpartition(".")
    last = "weight" if last in ("kernel", "scale", "embedding") else last
    return f"{head}.{last}" if head else last


def to_checkpoint(name: str, value: np.ndarray) -> np.ndarray:
    """A parameter in the file's layout: (..., in, out) kernels become (out, in, ...)."""
    return np.moveaxis(value, (-2, -1), (1, 0)) if name.endswith("kernel") else value


def from_checkpoint(name: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_checkpoint`."""
    return np.moveaxis(value, (1, 0), (-2, -1)) if name.endswith("kernel") else value


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the file has where the parameter has `shape`."""
    return (shape[-1], shape[-2], *shape[:-2]) if name.endswith("kernel") else tuple(shape)


def find_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one network in a diffusers or transformers folder.

    A single `stem.safetensors`, a sharded `stem.safetensors.index.json`, or the same with a
    variant (`stem.fp16.safetensors`); the full-precision file is preferred.
    Raises InputError that says which file is missing, or that only pickles are there.
    """
    path = find_weights(folder, stem)
    return [path] if path.suffix == ".safetensors" else _shards(path)


def find_weights(folder: Path, stem: str) -> Path:
    """What `find_files` goes by: the single safetensors file, or the index of the shards."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    # Indexes first: the names of their shards may look like those of single files.
    variants = [*sorted(folder.glob(f"{stem}.safetensors.index.*.json")),
                *sorted(folder.glob(f"{stem}.*.safetensors"))]
    for path in [folder / single, folder / index, *variants]:
        if path.is_file() and "-of-" not in path.name:
            return path
    if any(any(folder.glob(f"*.{suffix}")) for suffix in ("bin", "ckpt", "pt", "pth")):
        raise InputError(f"{folder} holds only pickled weights, which are never read: "
                         f"put {single} there")
    raise InputError(f"{folder / single} is missing: is the folder complete?")


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_read_index(index).values()))]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise InputError(f"{index} names {len(missing)} file(s) that are not there "
                         f"({', '.join(missing[:3])}): the download is incomplete")
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # Names only: an index never reads a file outside of its folder.
        if index and all(isinstance(v, str) and Path(v).name == v for v in index.values()):
            return index
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} is not a safetensors index: download it again")


@contextlib.contextmanager
def opened(files: list[Path]) -> Iterator[dict]:
    """Key -> open file, over all files of one network; tensors are read one by one on demand."""
    with contextlib.ExitStack() as stack:
        where = {}
        for path in files:
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except FileNotFoundError:
                raise InputError(f"{path} is missing") from None
            except (SafetensorError, OSError) as e:
                raise InputError(f"{path} is not a complete safetensors file ({e}): "
                                 "download it again") from None
            where.update(dict.fromkeys(handle.keys(), handle))
        yield where


def load(files: list[Path], network: Network, dtype: str = "float32",
         left_out: tuple[str, ...] = ()) -> Params:
    """Parameters of `network` from safetensors files, as host arrays of `dtype`.

    `left_out` are parts of the model ("text_model") that the network does without.

    Raises:
      InputError: a key is missing, unexpected or mis-shaped; the message names it and both shapes.
    """
    source = files[0].parent if len(files) > 1 else files[0]
    params = {}
    with opened(files) as where:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key, handle in where.items()
                  if key.split(".")[0] not in left_out}
        for name, key in match(network, shapes, source).items():
            value = _tensor(where[key], key, source)
            value = value.reshape(file_shape(name, network.shapes[name].shape))
            params[name] = np.asarray(from_checkpoint(name, value), DTYPES[dtype], order="C")
    return params


def match(network: Network, shapes: Mapping[str, tuple[int, ...]], source: Path) -> dict[str, str]:
    """{parameter: key} of a file's keys and shapes, for every parameter of `network`.

    Raises InputError as `load` does; `source` is what the message calls the file.
    """
    keys = {}
    for name, struct in network.shapes.items():
        expected = file_shape(name, struct.shape)
        key = next((k for k in _possible_keys(name) if k in shapes), None)
        if key is None:
            raise InputError(f"{source}: the key {to_key(name)} is missing; "
                             f"expected shape {expected}")
        # Older still than those names: attention by 1x1 convolutions.
        ones = (1, 1) if any(p in to_key(name) for p in _OLD_NAMES) else ()
        if shapes[key] not in (expected, (*expected, *ones)):
            raise InputError(f"{source}: {key} has shape {shapes[key]}, but the config asks "
                             f"for {expected}")
        keys[name] = key
    used = set(keys.values())
    unexpected = [k for k in shapes if k not in used and _TIED.get(k) not in used
                  and k.split(".")[-1] not in _BUFFERS]
    if unexpected:
        raise InputError(f"{source}: {len(unexpected)} unexpected key(s), e.g. {unexpected[0]} of "
                         f"shape {shapes[unexpected[0]]}: the file belongs to another model")
    return keys


def _possible_keys(name: str) -> Iterator[str]:
    key = to_key(name)
    yield key
    if "attentions" in key:
        yield from (key.replace(new, old) for new, old in _OLD_NAMES.items() if new in key)
    yield from (tied for tied, shared in _TIED.items() if key == shared)
    # transformers >= 5.6 writes a CLIPTextModel without the prefix that the hub's files have.
    if key.startswith("text_model."):
        yield key.removeprefix("text_model.")


def _tensor(handle, key: str, source: Path) -> np.ndarray:
    try:
        value = handle.get_tensor(key)
    except (SafetensorError, TypeError, ValueError, AttributeError) as e:  # NumPy has no float8
        raise InputError(f"{source}: {key} cannot be read ({e})") from None
    if value.dtype not in (*DTYPES.values(), np.dtype(np.float64)):
        raise InputError(f"{source}: {key} holds {value.dtype}, not floating-point numbers: "
                         "quantized weights are not supported")
    return value


def save(params: Params, path: Path, dtype: str = "float32",
         metadata: Mapping[str, str] | None = None) -> None:
    """Writes parameters as one safetensors file, atomically."""
    tensors = {
        to_key(name): np.asarray(to_checkpoint(name, np.asarray(value)), DTYPES[dtype], order="C")
        for name, value in params.items()
    }
    save_tensors(tensors, path, metadata)


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path,
                 metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors that already carry the file's names and layout, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)
    temporary.close()
    try:
        save_file(dict(tensors), temporary.name, metadata={"format": "pt", **(metadata or {})})
        os.chmod(temporary.name, 0o644)
        os.replace(temporary.name, path)
    except BaseException as e:
        os.unlink(temporary.name)
        if isinstance(e, SafetensorError):  # what safetensors makes of a full disk
            raise InputError(f"{path} cannot be written ({e}): is the disk full?") from None
        raise
