"""Miniatures of reward folders with random weights, for `:dryrun` recipes and tests.

    miniature_reward.write_reward(folder, "image_reward")     a folder of that type of reward

They have all files of the real folders.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r0_jax.models.blip import CycleReward, ImageReward, ImageRewardConfig
from r0_jax.models.chinese_clip import ChineseCLIPConfig, ChineseCLIPModel
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.open_clip import OpenCLIP, OpenCLIPConfig
from r0_jax.models.qwen2_vl import HPSv3, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.rewards import aesthetic, hps_v3, image_reward, tower, vlm_yes_no
from r0_jax.stand_ins.miniature import BERT, CLIP_TEXT
from r0_jax.stand_ins.miniature_files import kept_folder, write_json, write_weights
from r0_jax.stand_ins.miniature_tokenizer import EOS, TOKENS, vocabulary_size, write_tokenizer

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

QWEN2_VL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
}


def kept_reward(kind: str, seed: int) -> Path:
    """Return a folder in the user's cache with a reward of `REWARDS`; the first call makes it."""
    return kept_folder(f"{kind}-{seed}", lambda folder: write_reward(folder, kind, seed))


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
        "text_config": CLIP_TEXT | {"vocab_size": vocabulary_size("CLIPModel")},
        "vision_config": VISION,
        "logit_scale_init_value": 2.6592,
    }
    write_json(folder / "config.json", fields)
    _write_preprocessor(folder, crops=True)
    write_weights(
        folder / "model.safetensors",
        seed,
        lambda rngs: CLIPModel(CLIPConfig.from_json(fields), rngs=rngs),
    )


def _write_aesthetic(folder: Path, seed: int) -> None:
    _write_clip(folder, seed)
    write_weights(folder / aesthetic.HEAD, seed, lambda rngs: ScoreMLP(8, rngs=rngs))


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
            "vocab_size": vocabulary_size("CLIPModel"),
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    write_json(folder / tower.OPEN_CLIP_CONFIG, {"model_cfg": fields, "preprocess_cfg": {}})
    write_weights(
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
        "text_config": BERT | {"vocab_size": vocabulary_size("BertModel")},
    }
    write_json(folder / "config.json", fields)
    _write_preprocessor(folder, crops=False)
    write_weights(
        folder / "model.safetensors",
        seed,
        lambda rngs: ChineseCLIPModel(ChineseCLIPConfig.from_json(fields), rngs=rngs),
    )


def _write_image_reward(folder: Path, seed: int) -> None:
    _write_blip(folder, seed, ImageReward, "image_reward", image_reward.LENGTH)


def _write_cycle_reward(folder: Path, seed: int) -> None:
    _write_blip(folder, seed, CycleReward, "cycle_reward", image_reward.CYCLE_LENGTH)


def _write_blip(
    folder: Path, seed: int, kind: type[ImageReward], model_type: str, length: int
) -> None:
    write_tokenizer(folder, "BertTokenizer", "[PAD]")
    words = vocabulary_size("BertModel") + len(image_reward.SPECIAL)
    fields = {
        "vision_config": {
            "image_size": VISION["image_size"],
            "patch_size": 4,
            "width": 16,
            "layers": 1,
            "heads": 2,
        },
        "text_config": BERT
        | {"vocab_size": words, "num_hidden_layers": 1, "max_position_embeddings": length},
    }
    write_json(folder / "config.json", {"model_type": model_type} | fields)
    write_weights(
        folder / "model.safetensors",
        seed,
        lambda rngs: kind(ImageRewardConfig.from_json(fields), rngs=rngs),
    )


def _write_hps_v3(folder: Path, seed: int) -> None:
    texts = hps_v3.TEXTS
    words = vocabulary_size("Qwen2VLForConditionalGeneration", texts) + len(hps_v3.SPECIAL)
    _write_qwen2_vl(folder, seed, HPSv3, {"model_type": "hps_v3", "vocab_size": words}, texts)


def _write_vlm_yes_no(folder: Path, seed: int) -> None:
    texts = vlm_yes_no.TEXTS
    words = vocabulary_size("Qwen2VLForConditionalGeneration", texts)
    fields = {"model_type": "qwen2_vl", "vocab_size": words, "tie_word_embeddings": True}
    _write_qwen2_vl(folder, seed, Qwen2VLForConditionalGeneration, fields, texts)
    write_json(folder / "preprocessor_config.json", {"resample": 3, "do_resize": True})


def _write_qwen2_vl(
    folder: Path,
    seed: int,
    kind: type[HPSv3] | type[Qwen2VLForConditionalGeneration],
    fields: dict[str, Any],
    texts: Sequence[str],
) -> None:
    write_tokenizer(folder, "Qwen2Tokenizer", "<|endoftext|>", 32768, texts=texts)
    write_json(folder / "config.json", QWEN2_VL | fields)
    config = Qwen2VLConfig.from_json(QWEN2_VL | fields)
    write_weights(folder / "model.safetensors", seed, lambda rngs: kind(config, rngs=rngs))


# `type` of a reward -> the function that writes its folder.
REWARDS: dict[str, Callable[[Path, int], None]] = {
    "clip_score": _write_clip,
    "pickscore": _write_clip,
    "aesthetic": _write_aesthetic,
    "hps_v2": _write_open_clip,
    "hps_v2_1": _write_open_clip,
    "chinese_clip": _write_chinese_clip,
    "image_reward": _write_image_reward,
    "cycle_reward": _write_cycle_reward,
    "hps_v3": _write_hps_v3,
    "vlm_yes_no": _write_vlm_yes_no,
}


def _write_preprocessor(folder: Path, crops: bool) -> None:
    size = VISION["image_size"]
    sizes = {"shortest_edge": size} if crops else {"height": size, "width": size}
    write_json(
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
