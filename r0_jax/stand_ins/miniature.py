"""Miniatures of pretrained pipelines with random weights, for `:dryrun` recipes and tests.

    miniature.write(folder, "StableDiffusionXLPipeline")      a whole diffusers folder, 200 kB

They have all parts and files of the real folders.
"""

import itertools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r0_jax.pipelines.folder import NETWORKS
from r0_jax.stand_ins.miniature_files import kept_folder, random_params, write_json
from r0_jax.stand_ins.miniature_tokenizer import (
    EOS,
    PROMPTS,
    TOKENS,
    vocabulary_size,
    write_tokenizer,
)
from r0_jax.weights import convert
from r0_jax.weights.network import Network

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
VAE_16 = VAE | {  # of SD3 and FLUX.1, which Z-Image took over
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
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
Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "in_channels": 16,
    "dim": 24,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "cap_feat_dim": 20,
    "axes_dims": [4, 4, 4],
    "axes_lens": [600, 32, 32],
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

QWEN3 = {
    "architectures": ["Qwen3Model"],
    "model_type": "qwen3",
    "hidden_size": 20,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
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

# Family, "Taiyi" or "StableDiffusion3.5" -> {part: config.json}; a tokenizer has a class and a pad
# token instead.
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
        "vae": VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": CLIP_TEXT | {"architectures": ["CLIPTextModelWithProjection"]},
        "tokenizer": ("CLIPTokenizer", EOS),
        "text_encoder_2": BIG_CLIP_TEXT,
        "tokenizer_2": ("CLIPTokenizer", "!"),
        "text_encoder_3": T5,
        "tokenizer_3": ("T5TokenizerFast", "<pad>"),
    },
    "ZImagePipeline": {
        "transformer": Z_IMAGE,
        "scheduler": FLOW,
        "vae": VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": QWEN3,
        "tokenizer": ("Qwen2Tokenizer", EOS),
    },
}
MINIATURES["StableDiffusion3.5"] = MINIATURES["StableDiffusion3Pipeline"] | {
    "transformer": TRANSFORMER | {"qk_norm": "rms_norm", "dual_attention_layers": [0]}
}
# Of those that are not called as their class of diffusers is.
_CLASSES = {"Taiyi": "StableDiffusionPipeline", "StableDiffusion3.5": "StableDiffusion3Pipeline"}


def kept(name: str) -> Path:
    """Return a folder in the user's cache with pipeline/, one of `MINIATURES`, and prompts.

    prompts.txt has one a line; in prompts.jsonl each has an "english" text too. The first call
    makes the folder; later calls return the same one.
    """

    def make(folder: Path) -> None:
        write(folder / "pipeline", name)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        english = itertools.cycle(filter(str.isascii, PROMPTS))
        rows = [{"prompt": x, "english": y} for x, y in zip(PROMPTS, english, strict=False)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "prompts.jsonl").write_text(text, encoding="utf-8")

    return kept_folder(name, make)


def write(folder: Path, family: str, seed: int = 0, **changes: Mapping[str, Any] | None) -> None:
    """Write the diffusers folder of a family of `MINIATURES`.

    `changes` maps a part to changed fields of its config, or to None: omit the part (null in the
    index).
    """
    parts = MINIATURES[family]
    index: dict[str, Any] = {"_class_name": _CLASSES.get(family, family)}
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
            write_json(folder / name / "scheduler_config.json", part | change)
            index[name] = ["diffusers", (part | change)["_class_name"]]
        else:
            index[name] = _write_network(folder / name, part | change, seed)
    write_json(folder / "model_index.json", index)


def _write_network(folder: Path, fields: dict[str, Any], seed: int) -> list[str]:
    """Write config and weights of one part; return its entry of model_index.json."""
    kind = fields.get("_class_name") or fields["architectures"][0]
    if "architectures" in fields:
        fields = fields | {"vocab_size": vocabulary_size(kind)}
    build, stem = NETWORKS[kind]
    write_json(folder / "config.json", fields)
    network = Network.abstract(lambda rngs: build(fields, rngs))
    salt = zlib.crc32(folder.name.encode())  # otherwise both CLIPs would be alike
    convert.save(random_params(network, seed + salt), folder / f"{stem}.safetensors")
    return ["transformers" if "architectures" in fields else "diffusers", kind]
