"""Folders of published models at full size with random weights, as a user has them on disk.

Configs are the published ones, names and dtypes of files too. Tokenizers have as many tokens as the
published ones, made-up ones. Tensors are written one at a time.
"""

import functools
import gzip
import itertools
import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from r0_jax import convert_reward
from r0_jax.files import read_json
from r0_jax.stand_ins import blank, miniature, miniature_reward
from r0_jax.weights import tensor_file
from r0_jax.weights.tensor_file import Tensor, TensorFile

# Of the published files: OpenAI's and SAI's repositories hold float32, HPS v2.1 is "compressed".
REWARD_DTYPES = {"hps_v2_1": "float16"}
_MERGES = 49408 - 2 * 256 - 2  # of CLIP's tokens all but bytes, bytes at ends, and the two ends
_LOGIT_SCALE = 2.6592  # CLIP's first value
_T5 = ("text_encoder_3", "tokenizer_3")


def write_pipeline(folder: Path, family: str, seed: int = 0) -> None:
    """Write the diffusers folder of a class of pipelines, in float16, without T5.

    Weights of SD 1.x and SDXL lie in files of the variant fp16.
    """
    blank.write_pipeline(folder, family)
    for name in _T5:
        shutil.rmtree(folder / name, ignore_errors=True)
    variant = "" if family == "StableDiffusion3Pipeline" else ".fp16"
    for path in sorted(folder.glob("*/*.safetensors")):
        fill(path, path.with_name(f"{path.stem}{variant}.safetensors"), "float16", seed)
    for path in sorted(folder.glob("tokenizer*")):
        _write_clip_tokenizer(path)


def write_reward(folder: Path, kind: str, seed: int = 0) -> None:
    """Write the folder of a type of reward, in the dtype of the published file."""
    blank.write_reward(folder, kind)
    for path in sorted(folder.glob("*.safetensors")):
        fill(path, path, REWARD_DTYPES.get(kind, "float32"), seed)
    if (folder / "merges.txt").is_file():
        _write_clip_tokenizer(folder)


def write_decoder(folder: Path, family: str, seed: int = 0) -> None:
    """Write the tiny autoencoder for the latents of a family."""
    blank.write_decoder(folder, family)
    for path in sorted(folder.glob("*.safetensors")):
        fill(path, path, "float32", seed)


def write_miniature(folder: Path, family: str) -> None:
    """Write a pipeline as `write_pipeline` does, but in miniature."""
    absent = _T5 if family == "StableDiffusion3Pipeline" else ()
    miniature.write(folder, family, **dict.fromkeys(absent))


def write_miniature_reward(folder: Path, kind: str, seed: int) -> None:
    """Write a reward as `write_reward` does, but in miniature."""
    miniature_reward.write_reward(folder, kind, seed)


def fill(source: Path, target: Path, dtype: str, seed: int) -> None:
    """Write a safetensors file with the tensors of `source`, but random ones; `source` goes."""
    tensors = TensorFile(source).tensors
    tensor_file.write(
        target,
        [
            Tensor(
                key,
                stored.shape,
                np.dtype(dtype),
                functools.partial(draw, f"{source.parent.name}/{key}", stored.shape, dtype, seed),
            )
            for key, stored in tensors.items()
        ],
    )
    if source != target:
        source.unlink()


def draw(key: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Draw a tensor so that activations keep their size from layer to layer.

    Matrices and kernels have standard deviation 1 / sqrt(inputs); what has one axis 0.1, around 1
    where it scales a norm.
    """
    if not shape:
        return np.asarray(_LOGIT_SCALE, dtype)
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    value = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        value /= np.float32(math.sqrt(math.prod(shape[1:])))
    else:
        value *= np.float32(0.1)
        if key.endswith("weight"):
            value += np.float32(1)
    return value.astype(dtype)


def _write_clip_tokenizer(folder: Path) -> None:
    """Replace a tokenizer by one of CLIP's size, made of a file as OpenAI publishes it."""
    pad = read_json(folder / "tokenizer_config.json")["pad_token"]
    letters = sorted(ByteLevel.alphabet())
    pairs = itertools.product(letters, [letter + "</w>" for letter in letters])
    lines = ["#version: 0.2", *map(" ".join, itertools.islice(pairs, _MERGES)), ""]
    source = folder / "bpe_simple_vocab_16e6.txt.gz"
    source.write_bytes(gzip.compress("\n".join(lines).encode()))
    convert_reward.write_tokenizer(source, folder)
    source.unlink()
    fields = read_json(folder / "tokenizer_config.json") | {"pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
