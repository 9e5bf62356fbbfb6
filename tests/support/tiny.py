"""Pretrained folders in miniature: random weights, written by the libraries that write real ones.

tiny.stable_diffusion(tmp_path, seed=0, unet={"attention_head_dim": 4})   a diffusers folder
tiny.clip(tmp_path, seed=1)                                               a transformers folder
"""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

diffusers.logging.set_verbosity_error()  # it asks for a safety checker at each pipeline
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

TOKENS = 24  # of a prompt
PROMPTS = ["a red square", "a blue circle above a green star", "Ünï, 红 12!", ""]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = ["a", "red", "blue", "green", "square", "circle", "star", "above", "below", "of", "left"]

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
VAE = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
    "projection_dim": 12,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 12,
}
PNDM = {  # of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def stable_diffusion(folder: Path, seed: int = 0, **overrides: dict[str, Any]) -> Path:
    """Writes a whole Stable Diffusion folder and returns its path.

    `overrides` change config fields of a part: unet, vae, text_encoder, scheduler (of which
    another `_class_name` replaces everything).
    """
    scheduler = overrides.pop("scheduler", {})
    scheduler = scheduler if "_class_name" in scheduler else PNDM | scheduler
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet(seed, **overrides.pop("unet", {})),
        vae=vae(seed + 1, **overrides.pop("vae", {})),
        text_encoder=text_encoder(seed + 2, **overrides.pop("text_encoder", {})),
        tokenizer=tokenizer(folder / "tokenizer"),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert not overrides, f"no such part: {list(overrides)}"
    pipeline.save_pretrained(folder)
    # As the scheduler was given: stock pipelines overrule some fields, and it is they who should.
    path = folder / "scheduler" / "scheduler_config.json"
    saved = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(saved | scheduler), "utf-8")
    return folder


def clip(folder: Path, seed: int = 0, **overrides: dict[str, Any]) -> Path:
    """Writes a CLIPModel with tokenizer and preprocessor_config.json, and returns its path.

    `overrides` change config fields of a part: text, vision, preprocessor.
    """
    tokens = tokenizer(folder)
    text = TEXT | _token_ids(tokens) | overrides.pop("text", {})
    vision = VISION | overrides.pop("vision", {})
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    size = vision["image_size"]
    processor = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = transformers.CLIPImageProcessor(**processor | overrides.pop("preprocessor", {}))
    assert not overrides, f"no such part: {list(overrides)}"
    for part in (randomize(CLIPModel(config), seed), processor, tokens):
        part.save_pretrained(folder)
    return folder


def unet(seed: int = 0, **fields: Any) -> diffusers.UNet2DConditionModel:
    return randomize(diffusers.UNet2DConditionModel(**UNET | fields), seed)


def vae(seed: int = 0, **fields: Any) -> diffusers.AutoencoderKL:
    return randomize(diffusers.AutoencoderKL(**VAE | fields), seed)


def text_encoder(seed: int = 0, **fields: Any) -> CLIPTextModel:
    config = CLIPTextConfig(**TEXT | _token_ids() | fields)
    return randomize(CLIPTextModel(config), seed)


def tokenizer(folder: Path, model_max_length: int = TOKENS) -> CLIPTokenizer:
    """A real byte-level CLIP tokenizer that knows a few words; reads any text."""
    vocab, merges = _vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": model_max_length} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Makes every parameter random, in evaluation mode.

    Also those that torch starts at 0 or 1: a bias or a scale left out would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name == "logit_scale":
                value.add_(0.1 * noise)
            elif value.ndim == 1:
                is_scale = "norm" in name and name.endswith("weight")
                value.copy_(is_scale + 0.3 * noise)
            else:
                value.copy_(noise / math.sqrt(value[0].numel()))
    return module.eval()


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    letters = sorted(ByteLevel.alphabet())
    merges = {}  # left to right, a dict for its order
    for word in _WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(symbols)):
            merges["".join(symbols[:i]), symbols[i]] = None
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def _token_ids(tokens: CLIPTokenizer | None = None) -> dict[str, int]:
    vocab = _vocabulary()[0]
    return {
        "vocab_size": len(vocab),
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": vocab[EOS],
    }
