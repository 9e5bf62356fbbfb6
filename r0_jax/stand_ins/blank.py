"""Published pipelines and rewards at full size, with zeros for weights.

The zeros take no room on disk. `plan` compiles these folders when the real weights are missing.
`published/` holds the config files as they are on the Hub.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from r0_jax.errors import InputError
from r0_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from r0_jax.models.blip import CycleReward, ImageReward, ImageRewardConfig
from r0_jax.models.chinese_clip import ChineseCLIPConfig, ChineseCLIPModel
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.open_clip import OpenCLIP, OpenCLIPConfig
from r0_jax.models.qwen2_vl import HPSv3, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.pipelines.folder import NETWORKS
from r0_jax.rewards import aesthetic, hps_v3, image_reward, tower, vlm_yes_no
from r0_jax.stand_ins import miniature_tokenizer
from r0_jax.weights import convert, tensor_file
from r0_jax.weights.network import Network

_PUBLISHED = Path(__file__).parent / "published"
# Class of the pipeline in diffusers -> folder of its configs.
_PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "ZImagePipeline": "z_image",
}
# Type of a reward -> folder of its configs.
_REWARDS = {
    "hps_v2": "hps_v2_1",
    "hps_v2_1": "hps_v2_1",
    "hps_v3": "hps_v3",
    "vlm_yes_no": "qwen2_vl",
    "image_reward": "image_reward",
    "cycle_reward": "cycle_reward",
    "clip_score": "clip_score",
    "aesthetic": "clip_score",
    "pickscore": "pickscore",
    "chinese_clip": "chinese_clip",
}
# Class of the pipeline -> the tiny autoencoder for its latents.
_DECODERS = {
    "StableDiffusionPipeline": "taesd",
    "StableDiffusionXLPipeline": "taesdxl",
    "StableDiffusion3Pipeline": "taesd3",
    "ZImagePipeline": "taef1",
}


def write_pipeline(folder: Path, family: str, chinese: bool = False) -> str:
    """Write the diffusers folder of a pipeline class; return its published name.

    Its tokenizers know few words, but pad to the published lengths. With `chinese`, write Taiyi
    for Stable Diffusion 1.x.
    """
    name = _PIPELINES[family]
    shutil.copytree(_PUBLISHED / name, folder)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    if chinese and family == "StableDiffusionPipeline":
        name = "taiyi"
        shutil.copytree(_PUBLISHED / name, folder, dirs_exist_ok=True)
        index |= {
            "text_encoder": ["transformers", "BertModel"],
            "tokenizer": ["transformers", "BertTokenizer"],
        }
        (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    for part, (library, kind) in _parts(index).items():
        if kind in NETWORKS:
            build, stem = NETWORKS[kind]
            fields = json.loads((folder / part / "config.json").read_text("utf-8"))
            _write_zeros(
                folder / part / f"{stem}.safetensors",
                Network.abstract(lambda rngs, b=build, f=fields: b(f, rngs)),
            )
        elif kind == "BertTokenizer":
            fields = _read(folder / "text_encoder" / "config.json")
            miniature_tokenizer.write_tokenizer(
                folder / part,
                kind,
                "[PAD]",
                fields["max_position_embeddings"],
                fields["vocab_size"],
            )
        elif library == "transformers" and part.startswith("tokenizer"):
            pad = "<pad>" if kind.startswith("T5") else miniature_tokenizer.EOS
            miniature_tokenizer.write_tokenizer(folder / part, kind, pad, length=77)
    return name


def write_reward(folder: Path, kind: str) -> str:
    """Write the folder of a reward type; return its published name.

    Raise InputError for a type without a published model.
    """
    if kind not in _REWARDS:
        raise InputError(f"a reward of type {kind!r} has no published size: give it a path")
    shutil.copytree(_PUBLISHED / _REWARDS[kind], folder)
    network = Network.abstract(_tower(folder, kind))
    _write_tokenizer(folder, kind, network.config)
    stem = "open_clip_model" if (folder / tower.OPEN_CLIP_CONFIG).is_file() else "model"
    _write_zeros(folder / f"{stem}.safetensors", network)
    if kind == "aesthetic":
        _write_zeros(
            folder / aesthetic.HEAD,
            Network.abstract(lambda rngs: ScoreMLP(network.config.projection_dim, rngs=rngs)),
        )
    return kind


def write_decoder(folder: Path, family: str) -> str:
    """Write the tiny autoencoder for the latents of a family; return its published name."""
    shutil.copytree(_PUBLISHED / _DECODERS[family], folder)
    config = AutoencoderTinyConfig.from_json(_read(folder / "config.json"))
    _write_zeros(
        folder / "diffusion_pytorch_model.safetensors",
        Network.abstract(lambda rngs: AutoencoderTiny(config, rngs=rngs)),
    )
    return _DECODERS[family]


def _write_tokenizer(folder: Path, kind: str, config: Any) -> None:
    if texts := {"hps_v3": hps_v3.TEXTS, "vlm_yes_no": vlm_yes_no.TEXTS}.get(kind):
        words = config.vocab_size - (len(hps_v3.SPECIAL) if kind == "hps_v3" else 0)
        miniature_tokenizer.write_tokenizer(
            folder, "Qwen2Tokenizer", "<|endoftext|>", 32768, words, texts
        )
    elif kind in ("chinese_clip", "image_reward", "cycle_reward"):
        words = config.text_config.vocab_size
        added = 0 if kind == "chinese_clip" else len(image_reward.SPECIAL)
        miniature_tokenizer.write_tokenizer(folder, "BertTokenizer", "[PAD]", 77, words - added)
    else:
        miniature_tokenizer.write_tokenizer(folder, "CLIPTokenizer", miniature_tokenizer.EOS, 77)


def _tower(folder: Path, kind: str):
    if (folder / tower.OPEN_CLIP_CONFIG).is_file():
        fields = _read(folder / tower.OPEN_CLIP_CONFIG)["model_cfg"]
        module, config = OpenCLIP, OpenCLIPConfig.from_json(fields)
    else:
        module, parse = {
            "image_reward": (ImageReward, ImageRewardConfig),
            "cycle_reward": (CycleReward, ImageRewardConfig),
            "chinese_clip": (ChineseCLIPModel, ChineseCLIPConfig),
            "hps_v3": (HPSv3, Qwen2VLConfig),
            "vlm_yes_no": (Qwen2VLForConditionalGeneration, Qwen2VLConfig),
        }.get(kind, (CLIPModel, CLIPConfig))
        fields = {
            k: v
            for k, v in _read(folder / "config.json").items()
            if parse is not ImageRewardConfig or k != "model_type"
        }
        config = parse.from_json(fields)

    def construct(rngs: nnx.Rngs) -> nnx.Module:
        return module(config, rngs=rngs)

    return construct


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {part: tuple(entry) for part, entry in index.items() if isinstance(entry, list)}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _write_zeros(path: Path, network: Network) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensor_file.write(
        path,
        [
            tensor_file.Tensor(
                convert.to_key(name), convert.file_shape(name, shape.shape), dtype, None
            )
            for name, shape in network.shapes.items()
        ],
    )
