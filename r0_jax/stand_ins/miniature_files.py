"""The files of a miniature: a folder in the user's cache, JSON, random weights."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from r0_jax import remote
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params

# A change of any of them asks for new folders.
_SOURCES = sorted(Path(__file__).parent.glob("miniature*.py"))


def kept_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder in the user's cache, which the first call makes with `make`."""
    code = hashlib.sha256(b"".join(map(Path.read_bytes, _SOURCES))).hexdigest()[:12]
    folder = remote.cache() / "miniatures" / f"{name}-{code}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            make(building)
            try:
                os.rename(building, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def random_params(network: Network, seed: int) -> Params:
    """Draw every parameter at random, including biases and scales; equal on every machine."""
    params = {}
    for name, shape in network.shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        value = np.asarray(rng.standard_normal(shape.shape), np.float32)
        if name.endswith(("kernel", "embedding")):
            fan_in = np.prod(shape.shape[:-1]) if name.endswith("kernel") else 1
            params[name] = value / np.float32(np.sqrt(fan_in))
        else:
            params[name] = np.asarray(np.float32(0.1) * value + np.float32(name.endswith("scale")))
    return params


def write_weights(path: Path, seed: int, constructor: Callable[[nnx.Rngs], nnx.Module]) -> None:
    """Write random weights of a network; `seed` draws them."""
    convert.save(random_params(Network.abstract(constructor), seed), path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
