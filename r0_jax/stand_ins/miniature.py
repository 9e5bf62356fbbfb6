"""Miniatures of pretrained folders with random weights, for `:dryrun` recipes and tests.

    miniature.write(folder, "StableDiffusionXLPipeline")      a whole diffusers folder, 200 kB
    miniature.write_reward(folder, "image_reward")            a folder of that type of reward

They have all parts and files of the real folders.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from r0_jax import remote
from r0_jax.models.blip import ImageReward, ImageRewardConfig
from r0_jax.models.chinese_clip import ChineseCLIPConfig, ChineseCLIPModel
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.open_clip import OpenCLIP, OpenCLIPConfig
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.pipelines.folder import NETWORKS
from r0_jax.rewards import aesthetic, image_reward, tower
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params

PROMPTS = [
    "a red circle",
    "a blue square above a green star",
    "a green star",
    "红色的圆在左边",
    "a star left of a red square",
    "a blue circle",
    "绿色的方",
    "a red star of a circle",
]
TOKENS = 24  # tokens per prompt, for CLIP and BERT
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = sorted({word for prompt in PROMPTS for word in prompt.split() if word.isascii()})
_CHARACTERS = sorted({c for prompt in PROMPTS for c in prompt if not c.isascii()})

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
XL_UNET = UNET | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 40,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}
CLIP_TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
    "projection_dim": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,  # wrong, as in the published config; the end token has the highest id
}
BIG_CLIP_TEXT = CLIP_TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 24,
    "projection_dim": 12,
    "hidden_act": "gelu",
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 40,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **BETAS}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **BETAS}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

# Family, or "Taiyi" -> {part: config.json}; a tokenizer has a class and a pad token instead.
MINIATURES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": CLIP_TEXT,
        "scheduler": PNDM,
        "tokenizer": ("CLIPTokenizer", EOS),
    },
    "Taiyi": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": BERT,
        "scheduler": PNDM,
        "tokenizer": ("BertTokenizer", "[PAD]"),
    },
    "StableDiffusionXLPipeline": {
        "unet": XL_UNET,
        "vae": VAE | {"scaling_factor": 0.13025},
        "scheduler": EULER,
        "text_encoder": CLIP_TEXT,
        "tokenizer": ("CLIPTokenizer", EOS),
        "text_encoder_2": BIG_CLIP_TEXT,
        "tokenizer_2": ("CLIPTokenizer", "!"),
    },
    "StableDiffusion3Pipeline": {
        "transformer": TRANSFORMER,
        "scheduler": FLOW,
        "vae": VAE
        | {
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": CLIP_TEXT | {"architectures": ["CLIPTextModelWithProjection"]},
        "tokenizer": ("CLIPTokenizer", EOS),
        "text_encoder_2": BIG_CLIP_TEXT,
        "tokenizer_2": ("CLIPTokenizer", "!"),
        "text_encoder_3": T5,
        "tokenizer_3": ("T5TokenizerFast", "<pad>"),
    },
}


def kept(name: str) -> Path:
    """Return a folder in the user's cache with pipeline/, one of `MINIATURES`, and prompts.txt.

    The first call makes the folder; later calls return the same one.
    """

    def make(folder: Path) -> None:
        write(folder / "pipeline", name)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    return _kept(name, make)


def kept_reward(kind: str, seed: int) -> Path:
    """Return a folder in the user's cache with a reward of `REWARDS`; the first call makes it."""
    return _kept(f"{kind}-{seed}", lambda folder: write_reward(folder, kind, seed))


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # new code, new folder
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


def write(folder: Path, family: str, seed: int = 0, **changes: Mapping[str, Any] | None) -> None:
    """Write the diffusers folder of a family of `MINIATURES`.

    `changes` maps a part to changed fields of its config, or to None: omit the part (null in the
    index).
    """
    parts = MINIATURES[family]
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline" if family == "Taiyi" else family
    }
    if index["_class_name"] == "StableDiffusionPipeline":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    for name, part in parts.items():
        change = changes.get(name, {})
        if change is None:
            index[name] = [None, None]
        elif name.startswith("tokenizer"):
            write_tokenizer(folder / name, *part)
            index[name] = ["transformers", part[0]]
        elif name == "scheduler":
            _write_json(folder / name / "scheduler_config.json", part | change)
            index[name] = ["diffusers", (part | change)["_class_name"]]
        else:
            index[name] = _write_network(folder / name, part | change, seed)
    _write_json(folder / "model_index.json", index)


def write_reward(folder: Path, kind: str, seed: int = 0) -> None:
    """Write the folder of a reward type of `REWARDS`, in its published or converted layout."""
    REWARDS[kind](folder, seed)


def _write_clip(folder: Path, seed: int) -> None:
    """Write a transformers folder of a CLIPModel."""
    write_tokenizer(folder, "CLIPTokenizer", EOS)
    fields = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 8,
        "text_config": CLIP_TEXT | {"vocab_size": len(_clip_vocabulary()[0])},
        "vision_config": VISION,
        "logit_scale_init_value": 2.6592,
    }
    _write_json(folder / "config.json", fields)
    _write_preprocessor(folder, crops=True)
    _write_weights(
        folder / "model.safetensors",
        seed,
        lambda rngs: CLIPModel(CLIPConfig.from_json(fields), rngs=rngs),
    )


def _write_aesthetic(folder: Path, seed: int) -> None:
    _write_clip(folder, seed)
    _write_weights(folder / aesthetic.HEAD, seed, lambda rngs: ScoreMLP(8, rngs=rngs))


def _write_open_clip(folder: Path, seed: int) -> None:
    write_tokenizer(folder, "CLIPTokenizer", EOS)
    fields = {
        "embed_dim": 8,
        "vision_cfg": {
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 4,
            "image_size": VISION["image_size"],
        },
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": len(_clip_vocabulary()[0]),
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    _write_json(folder / tower.OPEN_CLIP_CONFIG, {"model_cfg": fields, "preprocess_cfg": {}})
    _write_weights(
        folder / "open_clip_model.safetensors",
        seed,
        lambda rngs: OpenCLIP(OpenCLIPConfig.from_json(fields), rngs=rngs),
    )


def _write_chinese_clip(folder: Path, seed: int) -> None:
    write_tokenizer(folder, "BertTokenizer", "[PAD]")
    fields = {
        "model_type": "chinese_clip",
        "projection_dim": 8,
        "vision_config": VISION,
        "text_config": BERT | {"vocab_size": _vocabulary_size("BertModel")},
    }
    _write_json(folder / "config.json", fields)
    _write_preprocessor(folder, crops=False)
    _write_weights(
        folder / "model.safetensors",
        seed,
        lambda rngs: ChineseCLIPModel(ChineseCLIPConfig.from_json(fields), rngs=rngs),
    )


def _write_image_reward(folder: Path, seed: int) -> None:
    write_tokenizer(folder, "BertTokenizer", "[PAD]")
    words = _vocabulary_size("BertModel") + len(image_reward.SPECIAL)
    fields = {
        "vision_config": {
            "image_size": VISION["image_size"],
            "patch_size": 4,
            "width": 16,
            "layers": 1,
            "heads": 2,
        },
        "text_config": BERT
        | {
            "vocab_size": words,
            "num_hidden_layers": 1,
            "max_position_embeddings": image_reward.LENGTH,
        },
    }
    _write_json(folder / "config.json", fields)
    _write_weights(
        folder / "model.safetensors",
        seed,
        lambda rngs: ImageReward(ImageRewardConfig.from_json(fields), rngs=rngs),
    )


# `type` of a reward -> the function that writes its folder.
REWARDS: dict[str, Callable[[Path, int], None]] = {
    "clip_score": _write_clip,
    "pickscore": _write_clip,
    "aesthetic": _write_aesthetic,
    "hps_v2": _write_open_clip,
    "hps_v2_1": _write_open_clip,
    "chinese_clip": _write_chinese_clip,
    "image_reward": _write_image_reward,
}


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


def write_tokenizer(
    folder: Path, kind: str, pad: str, length: int = TOKENS, words: int = 0
) -> None:
    """Write a tokenizer that knows the words of `PROMPTS` and reads any text.

    It pads to `length` tokens (T5: 512). BERT's vocabulary is filled up to `words` entries.
    """
    special = {"pad_token": pad, "model_max_length": length, "tokenizer_class": kind}
    if kind == "CLIPTokenizer":
        vocab, merges = _clip_vocabulary()
        _write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
        special |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    elif kind == "BertTokenizer":
        folder.mkdir(parents=True, exist_ok=True)
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS, *_CHARACTERS]
        tokens += [f"[unused{i}]" for i in range(len(tokens), words)]
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
        special |= {
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "do_lower_case": True,
        }
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _t5_tokenizer().save(str(folder / "tokenizer.json"))
        special |= {
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_ids": 0,
            "model_max_length": 512,
        }
    _write_json(folder / "tokenizer_config.json", special)


def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" is the first
    merges = {}  # an ordered set; merges go from left to right
    for word in _WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(symbols)):
            merges["".join(symbols[:i]), symbols[i]] = None
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def _t5_tokenizer() -> Tokenizer:
    words = [(f"▁{word}", -2.0) for word in _WORDS]
    letters = [(c, -6.0) for c in [*map(chr, range(33, 127)), *_CHARACTERS]]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *words, *letters]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _vocabulary_size(kind: str) -> int:
    if kind == "T5EncoderModel":
        return _t5_tokenizer().get_vocab_size()
    if kind == "BertModel":
        return 5 + len(_WORDS) + len(_CHARACTERS)
    return len(_clip_vocabulary()[0])


def _write_network(folder: Path, fields: dict[str, Any], seed: int) -> list[str]:
    """Write config and weights of one part; return its entry of model_index.json."""
    kind = fields.get("_class_name") or fields["architectures"][0]
    if "architectures" in fields:
        fields = fields | {"vocab_size": _vocabulary_size(kind)}
    build, stem = NETWORKS[kind]
    _write_json(folder / "config.json", fields)
    network = Network.abstract(lambda rngs: build(fields, rngs))
    salt = zlib.crc32(folder.name.encode())  # otherwise both CLIPs would be alike
    convert.save(random_params(network, seed + salt), folder / f"{stem}.safetensors")
    return ["transformers" if "architectures" in fields else "diffusers", kind]


def _write_preprocessor(folder: Path, crops: bool) -> None:
    size = VISION["image_size"]
    sizes = {"shortest_edge": size} if crops else {"height": size, "width": size}
    _write_json(
        folder / "preprocessor_config.json",
        {
            "size": sizes,
            "crop_size": {"height": size, "width": size},
            "do_center_crop": crops,
            "do_normalize": True,
            "do_resize": True,
            "resample": 3,
        },
    )


def _write_weights(path: Path, seed: int, constructor: Callable[[nnx.Rngs], nnx.Module]) -> None:
    convert.save(random_params(Network.abstract(constructor), seed), path)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
