"""What the fuzzer reads: a small world of every kind of file, and the readers of each.

A reader returns what it found wrong with its own result ("silent"), else None. It raises what the
program raises.
"""

import gzip
import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from mutations import value
from PIL import Image

from r0_jax import cli, convert_reward, convert_single_file, sample
from r0_jax import config as base
from r0_jax.diffusion import grid, schedulers
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.evaluation import feature_network, images, report, run_comparison, verdicts
from r0_jax.files import read_json
from r0_jax.models.autoencoder_kl import AutoencoderKLConfig
from r0_jax.models.clip import CLIPConfig, CLIPTextConfig
from r0_jax.models.dinov2 import Dinov2Config, Dinov2Model
from r0_jax.models.t5 import T5Config
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig
from r0_jax.pipelines import families, prediction, tokenizers
from r0_jax.pipelines.folder import read_index
from r0_jax.prompts import files
from r0_jax.rewards import tower
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.weights import convert, network, single_file
from r0_jax.weights.tensor_file import TensorFile
from r0_jax.workdir import checkpoint, run, sealed_json
from r0_jax.workdir.workdir import LocalWorkdir

PROMPTS = ["a red circle", "a blue star above a green square", "红色的圆", "a star " * 30]
LATENTS = (2, 8, 8, 4)
_STEP = 2


class Target(NamedTuple):
    """A kind of input.

    Attributes:
      folder: of the world, of which each case gets a copy.
      spoiled: pattern of the files of which one is spoiled; "" for command lines.
      read: reads the file, or runs the command; (path, folder, random numbers).
      weight: how often it is drawn.
    """

    name: str
    folder: str
    spoiled: str
    read: Callable[[Path, Path, random.Random], str | None]
    weight: float = 1.0


def build(world: Path, whole: bool) -> None:
    """Write the world; `whole` with what needs packages that are slow to import."""
    import pyarrow
    from pyarrow import parquet

    from r0_jax.stand_ins import miniature, miniature_reward

    text = world / "prompts"
    text.mkdir(parents=True)
    (text / "p.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    (text / "p.json").write_text(json.dumps(PROMPTS), "utf-8")
    (text / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (text / "p.csv").write_text(
        "id,prompt\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(PROMPTS))
    )
    parquet.write_table(pyarrow.table({"caption": PROMPTS}), text / "p.parquet")
    for name, family in (("sd15", "StableDiffusionPipeline"), ("sd3", "StableDiffusion3Pipeline")):
        miniature.write(world / name / "p", family)
    miniature_reward.write_reward(world / "clip", "clip_score")
    _write_dinov2(world / "dinov2")
    _write_images(world / "images")
    (world / "latents").mkdir()
    np.save(world / "latents" / "x.npy", np.zeros(LATENTS, np.float32))
    np.savez(world / "latents" / "eval_values.npz", a=np.zeros(3))
    _write_run(world / "run")
    _write_files(world / "files", world / "clip")
    if whole:
        import tfds_prompts
        import torch

        tfds_prompts.write({"prompt": PROMPTS}, world / "tfds")
        state = {"state_dict": {"a.weight": torch.zeros(4, 4), "b": torch.ones(3)}, "step": 3}
        torch.save(state, world / "files" / "x.pt")


def _write_dinov2(folder: Path) -> None:
    fields = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = Dinov2Config.from_json(fields)
    params = network.init(lambda rngs: Dinov2Model(config, rngs=rngs), jax.random.key(0))
    folder.mkdir()
    convert.save(params, folder / "model.safetensors")
    _dump(folder / "config.json", {"model_type": "dinov2", "architectures": ["D"], **fields})


def _write_images(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    for name, mode, form in (
        ("0.png", "RGB", "PNG"), ("1.jpg", "RGB", "JPEG"), ("2.webp", "RGB", "WEBP"),
        ("3.bmp", "RGB", "BMP"), ("4.png", "RGBA", "PNG"), ("5.png", "P", "GIF"),
        ("6.jpg", "CMYK", "JPEG"), ("7.png", "L", "TIFF"), ("8.png", "1", "PNG"),
    ):  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).convert(mode).save(folder / name, form, exif=exif)


def _run_fields() -> ConfigDict:
    config = base.get_config().unlock()
    config.pretrained, config.data.prompts = "/nowhere/base", "/nowhere/p.txt"
    config.rewards.clip = base.reward_entry("clip_score", path="/nowhere/clip")
    return config


def _write_run(folder: Path) -> None:
    """Write a workdir without arrays: what is read before them."""
    folder.mkdir()
    config = json.loads(json.dumps(_run_fields().to_dict()))
    _dump(folder / "config.json", sealed_json.seal(config))
    metadata = {"step": _STEP, "config_digest": "x", "metrics": {"heldout/h": 0.5}, "score": 0.5}
    _dump(
        folder / "checkpoints" / str(_STEP) / "metrics" / "metrics",
        sealed_json.seal({**metadata, "checksums": {"params": 3}}),
    )
    entry = {"value": 0.5, "ci95": [0.4, 0.6]}
    models = {"base_4": {"judge_accuracy": entry}, "r0_4": {"judge_accuracy": entry}}
    _dump(folder / "eval.json", {"models": models, "prompts": 4, "checkpoint": "step 2"})
    rows = [{"step": i, "train/loss": 0.1 * i, "reward/clip": 1.0} for i in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = folder / "samples" / "eval"
    kept.mkdir(parents=True)
    drawn = np.zeros((config["eval"]["grid"], 8, 8, 3), np.uint8)
    images.save_png(folder / "samples" / "step_000002.png", images.grid(drawn, 4))
    _dump(folder / "eval_prompts.json", [f"prompt {i}" for i in range(len(drawn))])
    images.save_png(kept / "0.png", np.zeros((8, 8, 3), np.uint8))
    row = {"prompt": "a", "files": {"base_4": "0.png", "r0_4": "0.png"}}
    (kept / "prompts.jsonl").write_text(json.dumps(row) + "\n")


def _write_files(folder: Path, clip: Path) -> None:
    folder.mkdir()
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = {
        unet: np.ones((8, 4, 3, 3), np.float16),
        "cond_stage_model.transformer.x.weight": np.ones((4, 4), np.float16),
        "first_stage_model.encoder.x.weight": np.ones((4, 4), np.float32),
    }
    convert.save_tensors(tensors, folder / "single.safetensors", {"modelspec.prediction_type": "v"})
    with gzip.open(folder / "bpe.txt.gz", "wb") as file:
        file.write((clip / "merges.txt").read_bytes())
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    _dump(folder / "m.safetensors.index.json", index)
    for name in index["weight_map"].values():
        convert.save_tensors({"a": np.zeros(3, np.float32)}, folder / name)
    (folder / "cfg.py").write_text(
        "from r0_jax import config as common\n\ndef get_config():\n    c = common.get_config()\n"
        "    c.unlock()\n    c.pretrained = '/nowhere'\n    c.data.prompts = '/nowhere/p.txt'\n"
        "    c.rewards.x = common.reward_entry('clip_score', path='/nowhere')\n    return c\n"
    )


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


# --- readers -------------------------------------------------------------------------------------


def _prompts(path: Path, folder: Path, rng: random.Random) -> str | None:
    found = files.read_prompts(path)
    joined = "\n".join(found).lower()
    for sign in ("\x00", "\x1b", "\ufeff", "git-lfs.github", "<!doctype", "<html"):
        if sign in joined:
            return f"a prompt holds {sign!r}"
    return None if all(found) else "a prompt is empty"


def _tfds(path: Path, folder: Path, rng: random.Random) -> str | None:
    return _prompts(folder, folder, rng)


def _index(path: Path, folder: Path, rng: random.Random) -> None:
    read_index(path.parent)


def _scheduler(path: Path, folder: Path, rng: random.Random) -> str | None:
    fields = read_json(path)
    fields["_class_name"] = rng.choice(
        (fields.get("_class_name"), "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler",
         "PNDMScheduler", "FlowMatchEulerDiscreteScheduler")
    )  # fmt: skip
    config = SchedulerConfig.from_json(fields, f"{path}: ")
    steps = rng.choice((1, 4, 25, 1000))
    own = schedulers.from_folder(config, steps, None)
    drawn = grid.grid(config, min(steps, 4), rng.choice((0, 1)))
    grid.exported(config, min(steps, 4))
    grid.noise_levels(config)
    for found in (own, drawn):
        if not np.isfinite(found.sigmas).all():
            return "sigmas are not finite"
    return None


_CONFIGS = {
    "unet": UNet2DConditionConfig,
    "vae": AutoencoderKLConfig,
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
    "text_encoder_3": T5Config,
    "transformer": SD3Transformer2DConfig,
    "clip": CLIPConfig,
}


def _config(path: Path, folder: Path, rng: random.Random) -> None:
    name = path.parent.name if path.parent != folder else "clip"
    _CONFIGS[name].from_json(read_json(path))


def _pipeline(path: Path, folder: Path, rng: random.Random) -> str | None:
    loaded = families.load(folder)
    loaded.tokenize(PROMPTS)
    if loaded.latent_shape[0] > 10**4:
        return f"latents of {loaded.latent_shape}"
    for part in loaded.params.values():
        for leaf in part.values():
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                return "weights are not finite"
    return None


def _tokenizer(path: Path, folder: Path, rng: random.Random) -> str | None:
    ids = tokenizers.tokenize(tokenizers.load_tokenizer(path.parent), PROMPTS, 24)
    return None if ids.shape == (len(PROMPTS), 24) and ids.min() >= 0 else f"ids {ids.shape}"


def _clip(path: Path, folder: Path, rng: random.Random) -> str | None:
    found = tower.load(folder)
    found.tokenize(PROMPTS)
    found.prepare.on_host(np.zeros((5, 7, 3), np.uint8))
    return None


def _dinov2(path: Path, folder: Path, rng: random.Random) -> str | None:
    found = feature_network.load(folder)
    found.prepare.on_host(np.zeros((5, 7, 3), np.uint8))
    values = {name: np.asarray(leaf) for name, leaf in found.params.items()}
    return None if all(np.isfinite(x).all() for x in values.values()) else "not finite"


def _image(path: Path, folder: Path, rng: random.Random) -> str | None:
    images.read_shape(path)
    pixels = images.load_png(path)
    prepare = Preprocess(16, rng.choice(("crop", "pad", "squash")), resize="reduce")
    if not np.isfinite(prepare.on_host(images.load_pixels(path))).all():
        return "not finite"
    right = pixels.ndim == 3 and pixels.shape[2] == 3 and 0 <= pixels.min() and pixels.max() <= 1
    return None if right else f"an image of {pixels.shape}"


def _latents(path: Path, folder: Path, rng: random.Random) -> str | None:
    found = sample.read_latents(path, LATENTS)
    return None if found.shape == LATENTS and np.isfinite(found).all() else "wrong noise"


def _values(path: Path, folder: Path, rng: random.Random) -> None:
    verdicts.read_values(folder)


def _run_config(path: Path, folder: Path, rng: random.Random) -> str | None:
    found = run.read_config(folder)
    text = json.loads(path.read_text("utf-8"))
    kept = {name: x for name, x in text.items() if name != "seal"}
    if "seal" in text and sealed_json.seal(kept)["seal"] != text["seal"]:
        return "an edited config is taken"
    if not np.isfinite(found.lora.alpha):
        return "alpha is not finite"
    return None


def _metadata(path: Path, folder: Path, rng: random.Random) -> str | None:
    workdir = LocalWorkdir(folder)
    scores = checkpoint.scores(workdir)
    return None if scores in ({}, {_STEP: 0.5}) else f"scores {scores}"


def _report(path: Path, folder: Path, rng: random.Random) -> None:
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # charts take seconds; `_curves` reads it
    report.write_report(folder)


def _side_by_side(path: Path, folder: Path, rng: random.Random) -> None:
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    other = folder / "other"
    other.mkdir(exist_ok=True)
    _dump(other / "config.json", sealed_json.seal(json.loads(json.dumps(_run_fields().to_dict()))))
    run_comparison.write([folder, other])


def _curves(path: Path, folder: Path, rng: random.Random) -> None:
    if path.is_file():
        report.curves.read(path)


def _single(path: Path, folder: Path, rng: random.Random) -> str | None:
    file = convert_single_file._open(path)
    shapes, dtypes = convert_single_file._read_header(file)
    convert_single_file.find_family(shapes, path)
    prediction.find(shapes, file.metadata, path)
    convert_single_file._common(dtypes)
    if single_file.needs_rewrite(file):
        return None
    for key in file.tensors:
        file.read(key)
    return None


def _shards(path: Path, folder: Path, rng: random.Random) -> None:
    for file in convert.find_files(folder, "m"):
        TensorFile(file)


def _pickle(path: Path, folder: Path, rng: random.Random) -> None:
    convert_reward.read_checkpoint(path)


def _bpe(path: Path, folder: Path, rng: random.Random) -> None:
    convert_reward.write_tokenizer(path, folder / "out")


# --- command lines -------------------------------------------------------------------------------

_ODD = (
    "", " ", "0", "-1", "1e9", "99999999999999999999", "nan", "inf", "-inf", "x", "None", "true",
    "[1]", "{}", "a=b", "=", ",", "a=b,c=d", "../..", "/dev/zero", "/dev/null", "/proc/self/mem",
    "~", "~nobody", "gs://", "s3://a/b", "http://x", "\x1b[2J", "\udcff", "x" * 5000, "红",
)  # fmt: skip
# Command -> flags with values that are right, and a value that ends it before networks compute.
_COMMANDS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "sample": (
        {"pipeline": "W/sd15/p", "prompts": "W/prompts/p.txt", "out": "F/o", "latents": "/nowhere"},
        ("num_inference_steps", "guidance_scale", "sigmas", "eta", "seed", "dtype", "step",
         "height", "width", "batch_size", "overwrite", "encoded", "pretrained", "workdir", "layout",
         "column", "id_column", "samples_per_prompt", "model_name", "language", "process",
         "processes"),
    ),
    "score": (
        {"images": "W/images", "prompts": "W/prompts/p.txt", "rewards": "clip_score=/nowhere",
         "out": "F/s.jsonl"},
        ("check", "batch_size", "dtype"),
    ),
    "export": (
        {"workdir": "W/run", "out": "F/o", "format": "peft"},
        ("step", "ema", "dtype", "overwrite", "pretrained", "base_model"),
    ),
    "evaluate": ({"workdir": "W/run"}, ()),
    "convert_reward": (
        {"reward": "aesthetic", "checkpoint": "W/files/single.safetensors", "out": "F/o"},
        ("tokenizer", "architecture", "architecture_config"),
    ),
    "convert_single_file": (
        {"checkpoint": "W/files/single.safetensors", "out": "F/o", "config": "W/files"},
        ("ema",),
    ),
    "main": ({"config": "W/files/cfg.py", "workdir": "F/w"}, ()),
    "encode_prompts": (
        {"config": "W/files/cfg.py", "out": "F/o"},
        ("batch_size", "dtype", "shard_prompts", "process", "processes"),
    ),
}  # fmt: skip
_FIELDS: list[str] = []


def _command(path: Path, folder: Path, rng: random.Random) -> str | None:
    """Run a command with odd flags; SystemExit tells how it ended."""
    world = path
    name = rng.choice(list(_COMMANDS))
    right, others = _COMMANDS[name]
    given = {
        flag: text.replace("W/", f"{world}/").replace("F/", f"{folder}/")
        for flag, text in right.items()
    }
    for _ in range(rng.choice((1, 1, 2, 3))):
        flag = rng.choice([*right, *others])
        if "config" in right and rng.random() < 0.7:
            flag = "config." + rng.choice(_fields())
        if flag == "latents":
            continue
        if rng.random() < 0.1:
            given.pop(flag, None)
        else:
            given[flag] = rng.choice(_ODD)
    arguments = [f"--{flag}={text}" for flag, text in given.items()]
    if rng.random() < 0.1:
        arguments.append(rng.choice(("x", "--", "--nox", "--flagfile=/dev/zero", "--help=x", "-")))
    module = importlib.import_module(f"r0_jax.{'export.__main__' if name == 'export' else name}")
    sys.argv = [name, *arguments]
    print(json.dumps(sys.argv), file=sys.stderr)
    module.define_flags()
    cli.run(module.main)


def _fields() -> list[str]:
    if not _FIELDS:
        _FIELDS.extend(name for name in cli._fields(base.get_config()))
    return _FIELDS


def _recipe(path: Path, folder: Path, rng: random.Random) -> None:
    """Check a config of which some fields hold another value, as a recipe may write."""
    from r0_jax import config_check

    config = base.get_config().unlock()
    config.rewards.x = base.reward_entry("clip_score", path="/nowhere")
    for _ in range(rng.choice((1, 2))):
        *sections, last = rng.choice(_fields()).split(".")
        part = config
        for section in sections:
            part = part[section] if isinstance(part, ConfigDict) else None
        if isinstance(part, ConfigDict):  # else its section is another value already
            part._fields[last] = value(rng)  # past the types of ConfigDict, as from a file
    config_check.check_config(config)


TARGETS = (
    Target("prompts", "prompts", "p.*", _prompts, 5),
    Target("a tfds folder", "tfds", "*", _tfds, 1.5),
    Target("model_index.json", "sd15/p", "model_index.json", _index, 2),
    Target("a scheduler", "sd15/p", "scheduler/*.json", _scheduler, 4),
    Target("configs of SD 1.5", "sd15/p", "[!ms]*/config.json", _config, 3),
    Target("configs of SD3", "sd3/p", "te*/config.json", _config, 2),
    Target("a transformer's config", "sd3/p", "transformer/config.json", _config, 2),
    Target("a pipeline", "sd15/p", "**/*.*", _pipeline, 1.5),
    Target("a pipeline of SD3", "sd3/p", "**/*.*", _pipeline, 0.5),
    Target("a tokenizer", "sd15/p", "tokenizer/*", _tokenizer, 3),
    Target("a CLIP folder", "clip", "*", _clip, 1.5),
    Target("a DINOv2 folder", "dinov2", "*", _dinov2, 1),
    Target("an image", "images", "*", _image, 6),
    Target("latents", "latents", "x.npy", _latents, 2),
    Target("values of an evaluation", "latents", "*.npz", _values, 1),
    Target("a run's config", "run", "config.json", _run_config, 3),
    Target("a checkpoint's metadata", "run", "checkpoints/2/metrics/metrics", _metadata, 2),
    Target("a report", "run", "[es]*/**/*.json*", _report, 0.5),
    Target("an evaluation", "run", "eval.json", _report, 1.5),
    Target("prompts of a run's grids", "run", "eval_prompts.json", _report, 0.5),
    Target("a run's grid", "run", "samples/*.png", _report, 0.5),
    Target("runs side by side", "run", "*.json", _side_by_side, 1),
    Target("metrics", "run", "metrics.jsonl", _curves, 2),
    Target("a single file", "files", "single.safetensors", _single, 3),
    Target("an index of shards", "files", "m*", _shards, 2),
    Target("a pickle", "files", "x.pt", _pickle, 1.5),
    Target("merges", "files", "*.gz", _bpe, 1),
    Target("a recipe", "files", "cfg.py", _recipe, 4),
    Target("a command line", "", "", _command, 4),
)
