"""Converts published reward checkpoints to folders that the rewards load; runs no pickle.

    python -m r0_jax.convert_reward --reward=hps_v2_1 --checkpoint=HPS_v2.1_compressed.pt \\
        --tokenizer=bpe_simple_vocab_16e6.txt.gz --out=rewards/hps_v2_1

A `.pt`, `.pth` or `.bin` file needs torch, which reads only tensors from it
(`weights_only=True`). A `.safetensors` file does not need torch. The names and shapes of tensors
are checked before anything is written.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import functools
import gzip
import json
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from absl import flags
from jaxtyping import Shaped
from tokenizers.pre_tokenizers import ByteLevel

from r0_jax import cli, machine, remote
from r0_jax.errors import InputError
from r0_jax.files import (
    check_not_pointer,
    check_regular,
    check_writable,
    naming,
    read_json,
    write_bytes,
)
from r0_jax.models import chinese_clip, open_clip, qwen2_vl
from r0_jax.models.blip import CycleReward, ImageReward, ImageRewardConfig
from r0_jax.models.chinese_clip import CNCLIP, CNCLIPConfig
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.inception_v3 import InceptionV3
from r0_jax.models.open_clip import OpenCLIP, OpenCLIPConfig
from r0_jax.models.qwen2_vl import HPSv3, Qwen2VLConfig
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.pipelines.tokenizers import FILES, check_files
from r0_jax.rewards import hps_v3, prompt_text
from r0_jax.rewards.aesthetic import HEAD
from r0_jax.rewards.image_reward import SPECIAL
from r0_jax.rewards.tower import OPEN_CLIP_CONFIG
from r0_jax.weights import convert, lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.weights.network import Network
from r0_jax.weights.tensor_file import TensorFile

Tensors = Mapping[str, Shaped[np.ndarray, "..."] | Lazy]
Fields = dict[str, Any]

# Tensors of published files that do not affect a score.
_UNUSED = ("bert.pooler.", "input_resolution", "context_length", "vocab_size", "lm_head.")
_UNUSED += ("fc.", "AuxLogits.")  # Inception's heads
_COUNTER = ".num_batches_tracked"
_BPE_MERGES = 49152 - 256 - 2  # CLIP uses this many merges of OpenAI's file
_BPE_BYTES = 16 * 2**20  # of that file, unpacked: it has 3.2 MB
_START, _END = "<|startoftext|>", "<|endoftext|>"


class Layout(NamedTuple):
    """The layout of a converted folder.

    Attributes:
      network: fields of the architecture -> network.
      files: fields of the architecture -> {name: contents} of the JSON files.
      weights: name of the safetensors file.
      tokenizer: (folder, fields) -> loaded tokenizer, as a check; None without a tokenizer.
    """

    network: Callable[[Fields], Network]
    files: Callable[[Fields], dict[str, Fields]]
    weights: str
    tokenizer: Callable[[Path, Fields], object] | None


def _network(kind: type, config_class: type) -> Callable[[Fields], Network]:
    def build(fields: Fields) -> Network:
        config = config_class.from_json(fields)
        return Network.abstract(lambda rngs: kind(config, rngs=rngs))

    return build


def _open_clip(resize_mode: str) -> Layout:
    def tokenizer(folder: Path, fields: Fields) -> object:
        text = OpenCLIPConfig.from_json(fields).text_cfg
        return prompt_text.open_clip(folder, text.context_length, text.vocab_size)

    return Layout(
        _network(OpenCLIP, OpenCLIPConfig),
        lambda fields: {
            OPEN_CLIP_CONFIG: {"model_cfg": fields, "preprocess_cfg": {"resize_mode": resize_mode}}
        },
        "open_clip_model.safetensors",
        tokenizer,
    )


def _clip_files(fields: Fields) -> dict[str, Fields]:
    size = CLIPConfig.from_json(fields).vision_config.image_size
    return {
        "config.json": {"model_type": "clip"} | fields,
        "preprocessor_config.json": {
            "resample": 3,
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
        },
    }


def _image_reward(kind: type[ImageReward], model_type: str) -> Layout:
    def tokenizer(folder: Path, fields: Fields) -> object:
        words = ImageRewardConfig.from_json(fields).text_config.vocab_size
        return prompt_text.wordpiece(folder, 2, words, SPECIAL)

    return Layout(
        _network(kind, ImageRewardConfig),
        lambda fields: {"config.json": {"model_type": model_type} | fields},
        "model.safetensors",
        tokenizer,
    )


def _clip_tokenizer(folder: Path, fields: Fields) -> object:
    text = CLIPConfig.from_json(fields).text_config
    return prompt_text.clip(folder, text.max_position_embeddings, text.vocab_size)


_HPS = _open_clip("longest")
_CLIP_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}
# Reward -> (layout, architectures by name, the published architecture; "" if there are several).
REWARDS: dict[str, tuple[Layout, dict[str, Fields], str]] = {
    "hps_v2": (_HPS, open_clip.ARCHITECTURES, "ViT-H-14"),
    "hps_v2_1": (_HPS, open_clip.ARCHITECTURES, "ViT-H-14"),
    "clip_score": (_open_clip("shortest"), open_clip.ARCHITECTURES, ""),
    "pickscore": (
        Layout(_network(CLIPModel, CLIPConfig), _clip_files, "model.safetensors", _clip_tokenizer),
        {"CLIP-H": _CLIP_H},
        "CLIP-H",
    ),
    "image_reward": (_image_reward(ImageReward, "image_reward"), {"v1.0": {}}, "v1.0"),
    "cycle_reward": (_image_reward(CycleReward, "cycle_reward"), {"v1.0": {}}, "v1.0"),
    "hps_v3": (
        Layout(
            _network(HPSv3, Qwen2VLConfig),
            lambda fields: {"config.json": fields | {"model_type": "hps_v3"}},
            "model.safetensors",
            lambda folder, fields: hps_v3.tokens(
                folder, Qwen2VLConfig.from_json(fields).vocab_size, 1
            ),
        ),
        {"Qwen2-VL-7B": qwen2_vl.HPS_V3},
        "Qwen2-VL-7B",
    ),
    "chinese_clip": (
        Layout(
            _network(CNCLIP, CNCLIPConfig),
            lambda fields: {"config.json": {"model_type": "cn_clip"} | fields},
            "model.safetensors",
            lambda folder, fields: prompt_text.wordpiece(
                folder, 2, CNCLIPConfig.from_json(fields).text.vocab_size
            ),
        ),
        chinese_clip.ARCHITECTURES,
        "",
    ),
    "aesthetic": (
        Layout(
            lambda fields: Network.abstract(lambda rngs: ScoreMLP(fields["inputs"], rngs=rngs)),
            lambda fields: {},
            HEAD,
            None,
        ),
        {"ViT-L-14": {"inputs": 768}},
        "ViT-L-14",
    ),
    # No reward, but what FID sees with: `evaluate --features`.
    "inception_v3": (
        Layout(
            lambda fields: Network.abstract(lambda rngs: InceptionV3(rngs=rngs)),
            lambda fields: {"config.json": {"model_type": "inception_v3"}},
            "model.safetensors",
            None,
        ),
        {"2015-12-05": {}},
        "2015-12-05",
    ),
}


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    flags.DEFINE_enum("reward", None, list(REWARDS), "what the checkpoint is", required=True)
    cli.define_path("checkpoint", None, "the published file", required=True)
    cli.define_path(
        "out",
        None,
        "the folder to write; for aesthetic, the CLIP folder that gets the head",
        required=True,
    )
    cli.define_path(
        "tokenizer",
        None,
        "bpe_simple_vocab_16e6.txt.gz, BERT's vocab.txt, or a folder with the tokenizer",
    )
    flags.DEFINE_string("architecture", None, "name of the architecture, if there are several")
    cli.define_path("architecture_config", None, "JSON file with fields of the architecture")


def convert_reward(
    reward: str,
    checkpoint: Path,
    out: Path,
    tokenizer: Path | None = None,
    fields: Fields | None = None,
) -> None:
    """Write the folder `out` in the dtype of the checkpoint; `fields` describe the architecture.

    Raise InputError, and write nothing, if the file does not fit `reward`.
    """
    layout, architectures, usual = REWARDS[reward]
    fields = architectures[usual] if fields is None else fields
    network = layout.network(fields)
    if layout.tokenizer and tokenizer is None:
        raise InputError(f"{reward} reads prompts: give its tokenizer with --tokenizer=PATH")
    check_writable(out)
    tensors = read_checkpoint(checkpoint)
    shapes = {key: value.shape for key, value in tensors.items()}
    keys = convert.match(network, shapes, checkpoint)
    if layout.tokenizer:
        with tempfile.TemporaryDirectory() as tried:
            write_tokenizer(tokenizer, Path(tried))
            layout.tokenizer(Path(tried), fields)
        write_tokenizer(tokenizer, out)
    convert.save_tensors({key: tensors[key] for key in keys.values()}, out / layout.weights)
    for name, contents in layout.files(fields).items():
        write_bytes(out / name, json.dumps(contents, indent=1).encode())


def read_checkpoint(path: Path) -> Tensors:
    """Read the tensors of a `.safetensors` file or a pickled state_dict; execute nothing.

    Those of a `.safetensors` file, which may be larger than the memory, are read when asked for.
    Remove the prefix `module.` of data-parallel training. Raise InputError for a file that is
    missing, incomplete, or holds anything but tensors.
    """
    check_regular(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    check_not_pointer(path)
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        state = {
            key: lazy.computed(stored.shape, file.dtype(key), functools.partial(file.read, key))
            for key, stored in file.tensors.items()
        }
    else:
        state = _read_pickle(path)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {
        key: value
        for key, value in state.items()
        if not (key.startswith(_UNUSED) or key.endswith(_COUNTER))
    }


def _read_pickle(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} is a pickle, which needs torch: pip install torch, or give a .safetensors file"
        ) from None
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(_numpy_scalars()),
        ):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a broken file may raise any exception
        if machine.problem(e):
            raise
        named = re.search(r"GLOBAL (\S+)", str(e))
        found = f"it holds {named[1]}" if named else "it cannot be read"
        raise InputError(
            f"{path} is not a complete file of plain tensors ({found}): download it again; nothing "
            "else is read from a pickle"
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors = (
        {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    if not tensors:
        raise InputError(f"{path} does not hold named tensors")

    def array(key: str, value: torch.Tensor) -> np.ndarray:
        if kind := _unusual(value):
            raise InputError(
                f"{path}: {key} is {kind}, not a plain tensor: save the model with plain weights "
                "in float32, float16 or bfloat16"
            )
        value = value.detach().contiguous()
        if value.dtype == torch.bfloat16:  # NumPy lacks bfloat16
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

    return {str(key): array(str(key), value) for key, value in tensors.items()}


def _unusual(value: Any) -> str | None:
    """Return what a tensor is that has no plain numbers in memory; None for a plain one."""
    import torch

    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)
    plain += (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    if value.is_meta:
        return "a meta tensor without values"
    if value.is_quantized or value.dtype not in plain:
        return f"of {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of {value.numel()} numbers of which the file holds fewer"
    return None


def _numpy_scalars() -> list[Any]:
    """Return what NumPy's numbers are made of; trainers save scores beside the weights."""
    dtypes = [type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")]
    from numpy._core.multiarray import scalar

    return [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *dtypes]


def write_tokenizer(source: Path, out: Path) -> None:
    """Write a tokenizer to `out`, from OpenAI's merges, BERT's vocabulary, or a folder.

    Raise InputError if `source` is none of these.
    """
    check_regular(source)
    if not source.exists():
        raise InputError(f"--tokenizer={source}: no such file or folder")
    check_not_pointer(source)
    if source.is_dir():
        found = [source / name for name in FILES if (source / name).is_file()]
        if not found:
            raise InputError(f"--tokenizer={source} does not hold a tokenizer")
        check_files(source)
        out.mkdir(parents=True, exist_ok=True)
        for path in found:
            if path.resolve() != (out / path.name).resolve():
                shutil.copyfile(path, out / path.name)
    elif source.name.endswith((".txt.gz", "bpe.gz")):
        _write_bpe(source, out)
    elif source.suffix == ".txt":
        write_bytes(out / "vocab.txt", source.read_bytes())
    else:
        raise InputError(
            f"--tokenizer={source}: expected OpenAI's merges (.txt.gz), BERT's "
            "vocab.txt, or a folder"
        )


def _write_bpe(path: Path, out: Path) -> None:
    """Write transformers' two files from OpenAI's one.

    The ids are those of bytes, then of bytes that end a word, then of merges.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(_BPE_BYTES + 1)
        if len(data) > _BPE_BYTES:  # a small file may unpack to a disk full
            raise EOFError
        lines = data.decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise InputError(
            f"{path} is not a gzipped list of merges, or not a whole one: download it again"
        ) from None
    merges = [line for line in lines[1 : 1 + _BPE_MERGES] if len(line.split()) == 2]
    # Printable bytes stand for themselves and come first; the others have codes from 256 on.
    letters = sorted(ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))
    tokens = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m.split()) for m in merges),
        _START,
        _END,
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | special
    write_bytes(out / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
    write_bytes(out / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    write_bytes(out / "tokenizer_config.json", json.dumps(config).encode())


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    _, architectures, usual = REWARDS[given.reward]
    if given.architecture_config:
        fields = read_json(given.architecture_config)
    else:
        name = given.architecture or usual
        if name not in architectures:
            raise InputError(
                f"--architecture={name}: {given.reward} is published as {', '.join(architectures)}"
            )
        fields = architectures[name]
    out = remote.output(given.out)
    # A wrong field is named with its file before the checkpoint is read.
    with naming(given.architecture_config or f"--architecture={given.architecture or usual}"):
        REWARDS[given.reward][0].network(fields)
    convert_reward(
        given.reward,
        remote.local(given.checkpoint),
        out,
        remote.local(given.tokenizer) if given.tokenizer else None,
        fields,
    )
    print(f"{given.reward} is in {out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
