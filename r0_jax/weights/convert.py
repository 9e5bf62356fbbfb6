"""Checkpoint files <-> flat parameters: one rule, both ways.

A module's attributes have exactly the names of the checkpoint file. The rule is
  key   = dotted path with the last name `kernel | scale | embedding` -> `weight`
  value = `kernel` with its (in, out) axes moved from the last two places to (1, 0)
and nothing else changes. Import walks the network's parameters and asks the file for each key;
export is the same walk. Both read and write one tensor at a time.
"""

import functools
import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular, loads, pickles
from r0_jax.weights import tensor_file
from r0_jax.weights.lazy import Index, Lazy
from r0_jax.weights.network import Network, Params
from r0_jax.weights.tensor_file import Tensor, TensorFile

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

MAX_SHARD_SIZE = 10 * 10**9  # bytes, as diffusers' `save_pretrained` has it
_PIECE = 2**18  # numbers read at once by each thread
_THREADS = min(4, os.cpu_count() or 1)  # more would hold too many pieces
_OWN_PAGES = 2**17  # bytes from which an array gets pages of its own
_NAME = 255  # bytes of the longest file name on any system

# Buffers that old files hold and that no network has.
_BUFFERS = ("position_ids",)
# What files hold beside the network that is read: the rest of a CLIP, a trainer's counter.
_BESIDE = ("logit_scale", "vision_model", "visual_projection", "text_projection", "global_step")
# A text encoder's layer in a file of transformers: CLIP's, BERT's, T5's.
_LAYER = re.compile(r"(?:\w+\.)?encoder\.(?:layers?|block)\.(\d+)\.")
# T5's encoder shares its table of tokens with the decoder: files hold one name or both.
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
# Old VAE files name the mid-block attention after its first implementation.
_OLD_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}


def to_key(name: str) -> str:
    """Return the checkpoint file's key of a parameter."""
    head, _, last = name.rpartition(".")
    last = "weight" if last in ("kernel", "scale", "embedding") else last
    return f"{head}.{last}" if head else last


def to_checkpoint(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter in the file's layout: (..., in, out) kernels become (out, in, ...)."""
    return np.moveaxis(value, (-2, -1), (1, 0)) if name.endswith("kernel") else value


def from_checkpoint(name: str, value: np.ndarray) -> np.ndarray:
    """Undo `to_checkpoint`."""
    return np.moveaxis(value, (1, 0), (-2, -1)) if name.endswith("kernel") else value


def file_shape(name: str, shape: tuple) -> tuple:
    """Return the file's shape of a parameter of this shape; or, of an index, the file's index."""
    return (shape[-1], shape[-2], *shape[:-2]) if name.endswith("kernel") else tuple(shape)


def find_files(folder: Path, stem: str) -> list[Path]:
    """Return the safetensors files of one network in a diffusers or transformers folder.

    They are a single `stem.safetensors`, a sharded `stem.safetensors.index.json`, or the same with
    a variant (`stem.fp16.safetensors`): the first of these whose files are all there. Of both the
    first two, diffusers reads the shards and transformers the single file; so does this.
    Raises InputError that says which file is missing, or that only pickles are there.
    """
    return _files(find_weights(folder, stem))


def find_weights(folder: Path, stem: str) -> Path:
    """Return the single safetensors file, or the index of the shards, as `find_files` does."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    # Indexes first: the names of their shards may look like those of single files.
    variants = [
        *sorted(folder.glob(f"{stem}.safetensors.index.*.json")),
        *sorted(folder.glob(f"{stem}.*.safetensors")),
    ]
    plain = [folder / single, folder / index]
    if stem.startswith("diffusion"):
        plain.reverse()
    found = [path for path in [*plain, *variants] if path.is_file() and "-of-" not in path.name]
    for path in found:  # a download of one variant brings the other's index too
        try:
            _files(path)
        except InputError:
            continue
        return path
    if found:
        return found[0]  # `find_files` says what it lacks
    if pickles(folder):
        library = "diffusers" if stem.startswith("diffusion") else "transformers"
        raise InputError(
            f"{folder} holds only pickled weights, which are never read: load it once "
            f"in PyTorch with {library}' from_pretrained and save it there with "
            f"save_pretrained, which writes {single}"
        )
    raise InputError(f"{folder / single} is missing: is the folder complete?")


def _files(path: Path) -> list[Path]:
    """Return the files of a file or index; raise InputError unless all are there."""
    return [path] if path.suffix == ".safetensors" else _shards(path)


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_read_index(index).values()))]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise InputError(
            f"{index} names {len(missing)} file(s) that are not there "
            f"({', '.join(missing[:3])}): the download is incomplete"
        )
    return files


def _read_index(path: Path) -> dict[str, str]:
    check_regular(path)
    try:
        index = loads(path.read_text(encoding="utf-8"))["weight_map"]
        # Only valid names of files: an index never leads out of its folder.
        if index and all(
            isinstance(v, str) and Path(v).name == v and len(v.encode()) <= _NAME
            for v in index.values()
        ):
            return index
    except (ValueError, KeyError, TypeError, AttributeError):
        check_not_pointer(path)
    raise InputError(f"{path} is not a safetensors index: download it again")


def open_params(
    files: list[Path], network: Network, dtype: str = "float32", left_out: tuple[str, ...] = ()
) -> dict[str, Lazy]:
    """Return the parameters of `network`, in their safetensors files until they are read.

    They are read as `dtype`. `left_out` are parts of the model ("text_model") that the network
    does not have.

    Raises:
      InputError: a key is missing, unexpected or mis-shaped; the message names it and both shapes.
        Reading also raises it for a tensor that holds NaN or infinities.
    """
    source = files[0].parent if len(files) > 1 else files[0]
    where = {
        key: file
        for file in map(TensorFile, files)
        for key in file.tensors
        if key.split(".")[0] not in left_out
    }
    shapes = {key: file.tensors[key].shape for key, file in where.items()}
    keys = match(network, shapes, source)
    for key in keys.values():
        if (found := where[key].tensors[key].dtype) not in (*DTYPES, "float64"):
            raise InputError(
                f"{source}: {key} holds {found}, not floating-point numbers that are "
                "read: quantized weights are not supported"
            )
    return {
        name: _leaf(where[key], key, name, network.shapes[name].shape, DTYPES[dtype])
        for name, key in keys.items()
    }


def load(files: list[Path], network: Network, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Read all that `open_params` opens to the host; for small networks."""
    return {name: np.asarray(leaf) for name, leaf in open_params(files, network, dtype).items()}


def _leaf(file: TensorFile, key: str, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Lazy:
    return Lazy(shape, dtype, functools.partial(_read, file, key, name, shape))


def _read(
    file: TensorFile, key: str, name: str, shape: tuple[int, ...], index: Index, dtype: np.dtype
) -> Shaped[np.ndarray, "..."]:
    result = _empty([part.stop - part.start for part in index], dtype)
    _fill(to_checkpoint(name, result), file, key, file_shape(name, shape), file_shape(name, index))
    return result


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return `np.empty` whose memory goes back to the system when it is freed.

    malloc would keep some of it, between shards that were allocated in the meantime.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _OWN_PAGES:
        return np.empty(shape, dtype)
    # Aligned as malloc aligns. A CPU device keeps what is aligned better, as one of its shards
    # instead of a copy; where there are several, it keeps the memory of all.
    pages = mmap.mmap(-1, count * dtype.itemsize + 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, count, offset=16).reshape(shape)


def _fill(
    target: np.ndarray, file: TensorFile, key: str, shape: tuple[int, ...], index: Index
) -> None:
    """Do target[...] = tensor[index], by pieces that the processor's cache holds.

    `shape` is the tensor's, apart from axes of length 1.
    """
    if not target.size:
        return
    while shape and shape[0] == 1:  # or one row could be all of it
        target, shape, index = target[0, ...], shape[1:], index[1:]
    if not shape:
        target, shape, index = target.reshape(1), (1,), (slice(0, 1),)
    rows = index[0]
    count = min(max(1, _PIECE // max(1, math.prod(shape[1:]))), rows.stop - rows.start)
    starts = range(rows.start, rows.stop, count)
    threads = min(_THREADS, len(starts))  # NumPy lets go of the interpreter while it copies
    work = functools.partial(_fill_pieces, target, file, key, shape, index, count)
    if threads == 1:
        return work(starts)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [starts[thread::threads] for thread in range(threads)]))


def _fill_pieces(
    target: np.ndarray,
    file: TensorFile,
    key: str,
    shape: tuple[int, ...],
    index: Index,
    count: int,
    starts: range,
) -> None:
    """Fill the pieces of `count` rows, the last one perhaps shorter, that begin at `starts`."""
    (rows, *columns), row = index, math.prod(shape[1:])
    # Made once: malloc keeps arrays that a thread makes and frees.
    stored = _empty([count, *shape[1:]], file.dtype(key))
    bits = np.dtype(np.uint16 if target.dtype.itemsize == 2 else np.bool_)
    rounded, spare = (_empty([count, *target.shape[1:]], dtype) for dtype in (target.dtype, bits))
    for first in starts:
        last = min(first + count, rows.stop)
        piece, result, tested = (x[: last - first] for x in (stored, rounded, spare))
        file.read_into(piece, key, first * row)
        with np.errstate(all="ignore"):  # the check below tells what it would warn of
            # Rounded first: rounding while axes move is slower.
            np.copyto(result, piece[(slice(None), *columns)], casting="unsafe")
        if not _finite(result, tested):
            raise InputError(f"{file.path}: {_not_finite(file, key, piece, target.dtype)}")
        target[first - rows.start : last - rows.start] = result


def _not_finite(file: TensorFile, key: str, stored: np.ndarray, dtype: np.dtype) -> str:
    """Say why a piece of a tensor is not finite in `dtype`."""
    if np.isfinite(stored.astype(np.float64)).all():
        name = file.tensors[key].dtype
        return f"{key} holds numbers of {name} that are too large for {dtype}: give a wider dtype"
    return f"{key} holds NaN or infinities: give weights that are whole"


def _finite(x: np.ndarray, spare: np.ndarray) -> bool:
    """Return whether all of `x` is finite.

    It overwrites `spare`, of bool or, for `x` of two bytes, of two bytes too.
    """
    if x.dtype.itemsize != 2:
        return bool(np.isfinite(x, out=spare).all())
    exponent = np.uint16(0x7C00 if x.dtype == np.float16 else 0x7F80)  # NumPy is slow at this
    return bool(np.bitwise_and(x.view(np.uint16), exponent, out=spare).max(initial=0) != exponent)


def match(network: Network, shapes: Mapping[str, tuple[int, ...]], source: Path) -> dict[str, str]:
    """Return {parameter: key} for every parameter of `network`, by a file's keys and shapes.

    Skip the layers beyond those of a text encoder's config, with a warning, as transformers does.
    Raises InputError as `open_params` does; its message calls the file `source`.
    """
    keys = {}
    for name, struct in network.shapes.items():
        expected = file_shape(name, struct.shape)
        key = next((k for k in _possible_keys(name) if k in shapes), None)
        if key is None:
            raise InputError(
                f"{source}: the key {to_key(name)} is missing; expected shape {expected}"
            )
        # Even older files have attention by 1x1 convolutions.
        ones = (1, 1) if any(p in to_key(name) for p in _OLD_NAMES) else ()
        if shapes[key] not in (expected, (*expected, *ones)):
            raise InputError(
                f"{source}: {key} has shape {shapes[key]}, but the config asks for {expected}"
            )
        keys[name] = key
    used = set(keys.values())
    unexpected = [
        k
        for k in shapes
        if k not in used and _TIED.get(k) not in used and k.split(".")[-1] not in _BUFFERS
    ]
    beyond = _beyond(network, unexpected)
    beside = _beside(network, unexpected)
    unexpected = [k for k in unexpected if k not in beyond | beside]
    if unexpected:
        raise InputError(
            f"{source}: {len(unexpected)} unexpected key(s), e.g. {unexpected[0]} of "
            f"shape {shapes[unexpected[0]]}: the file belongs to another model"
        )
    if beyond:
        warnings.warn(
            f"{source}: the config has {_depth(network)} layers: those beyond it in the file are "
            "skipped (clip skip)",
            stacklevel=2,
        )
    return keys


def _beside(network: Network, unexpected: list[str]) -> set[str]:
    """Return the keys of parts that the network does not have, and that are known to be harmless.

    The libraries skip any such key; here an unknown one shows that the file is of another model.
    """
    own = {name.split(".")[0] for name in network.shapes}
    return {
        key for key in unexpected if (first := key.split(".")[0]) in _BESIDE and first not in own
    }


def _beyond(network: Network, unexpected: list[str]) -> set[str]:
    """Return a text encoder's keys beyond its last layer."""
    found = {key: _LAYER.match(key) for key in unexpected}
    depth = _depth(network)
    return {key for key, match in found.items() if match and depth and int(match[1]) >= depth}


def _depth(network: Network) -> int | None:
    """Return the number of a text encoder's layers; None for other networks."""
    config = network.config
    return getattr(config, "num_hidden_layers", getattr(config, "num_layers", None))


def _possible_keys(name: str) -> Iterator[str]:
    key = to_key(name)
    yield key
    if "attentions" in key:
        yield from (key.replace(new, old) for new, old in _OLD_NAMES.items() if new in key)
    yield from (tied for tied, shared in _TIED.items() if key == shared)
    # transformers >= 5.6 writes a CLIPTextModel without the prefix of the hub's files, and so does
    # any version a Qwen3Model, whose published files are those of a language model.
    for prefix in ("text_model.", "model."):
        if key.startswith(prefix):
            yield key.removeprefix(prefix)


def save(
    params: Params, path: Path, dtype: str = "float32", metadata: Mapping[str, str] | None = None
) -> None:
    """Write parameters as one safetensors file, atomically and one at a time."""
    tensor_file.write(path, _tensors(params, dtype), metadata)


def save_shards(params: Params, folder: Path, stem: str, dtype: str = "float32") -> None:
    """Write parameters as diffusers does: one file, or above 10 GB shards with an index."""
    shards: list[list[Tensor]] = [[]]
    for tensor in _tensors(params, dtype):
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > MAX_SHARD_SIZE:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return tensor_file.write(folder / f"{stem}.safetensors", shards[0])
    files = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        tensor_file.write(folder / name, shard)
        files |= dict.fromkeys((tensor.key for tensor in shard), name)
    total = sum(tensor.size for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def _tensors(params: Params, dtype: str) -> list[Tensor]:
    return [
        Tensor(
            to_key(name),
            file_shape(name, value.shape),
            DTYPES[dtype],
            functools.partial(_stored, name, value, dtype),
        )
        for name, value in params.items()
    ]


def _stored(name: str, value: Any, dtype: str) -> np.ndarray:
    """Return a parameter as its file holds it."""
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        whole = np.asarray(to_checkpoint(name, np.asarray(value)), DTYPES[dtype], order="C")
    return _whole(to_key(name), whole)


def save_tensors(
    tensors: Mapping[str, np.ndarray | Lazy], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that already have the file's names and layout, atomically."""
    tensor_file.write(
        path,
        [
            Tensor(
                key,
                value.shape,
                value.dtype,
                lambda key=key, value=value: _whole(key, np.asarray(value)),
            )
            for key, value in tensors.items()
        ],
        metadata,
    )


def _whole(key: str, value: np.ndarray) -> np.ndarray:
    """Return a tensor that is to be written; raise InputError if it is not finite."""
    if value.dtype.kind in "iub":
        return value
    if not _finite(value, np.empty_like(value, np.uint16 if value.itemsize == 2 else bool)):
        raise InputError(
            f"{key} holds NaN or infinities in {value.dtype}, so nothing is written: choose "
            "another checkpoint, or a dtype that holds its numbers"
        )
    return value
