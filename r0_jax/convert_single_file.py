"""Converts a single-file checkpoint to a diffusers folder, with diffusers' single-file loader.

    python -m r0_jax.convert_single_file --checkpoint=sd_xl_base_1.0.safetensors \\
        --config=stable-diffusion-xl-base-1.0 --out=pipelines/sdxl

Needs torch and diffusers (`pip install 'r0_jax[convert]'`); reading the result does not. A
checkpoint holds neither configs nor tokenizers. They come from a diffusers folder of the same
family, which needs no weights. Nothing is downloaded.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags
from absl import logging as absl_logging
from safetensors import SafetensorError

from r0_jax import cli, files, remote
from r0_jax.diffusion.scheduler_config import SCHEDULERS
from r0_jax.errors import InputError
from r0_jax.files import (
    A_PICKLE,
    check_link,
    check_not_pointer,
    check_regular,
    check_writable,
    copy_file,
    is_pickle,
    read_json,
)
from r0_jax.pipelines import prediction, tokenizers
from r0_jax.pipelines.folder import describe, read_index
from r0_jax.weights import single_file
from r0_jax.weights.tensor_file import TensorFile

Shapes = Mapping[str, tuple[int, ...]]

# Family -> (repository of its configs on the Hub, {other part: prefixes of its keys}).
_FAMILIES = {
    "StableDiffusionPipeline": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"text encoder": ("cond_stage_model.transformer.",), "VAE": ("first_stage_model.", "vae.")},
    ),
    "StableDiffusionXLPipeline": (
        "stabilityai/stable-diffusion-xl-base-1.0",
        {
            "first text encoder": ("conditioner.embedders.0.transformer.",),
            "second text encoder": ("conditioner.embedders.1.model.",),
            "VAE": ("first_stage_model.", "vae."),
        },
    ),
    "StableDiffusion3Pipeline": (
        "stabilityai/stable-diffusion-3-medium-diffusers",
        {
            "first text encoder": ("text_encoders.clip_l.",),
            "second text encoder": ("text_encoders.clip_g.",),
            "VAE": ("first_stage_model.", "vae."),
        },
    ),
}
_T5 = "text_encoders.t5xxl.transformer.shared.weight"
# Optional parts and fields that the converted folder omits.
_LEFT_OUT = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {"feature_extractor": None, "image_encoder": None},
    "StableDiffusion3Pipeline": {"feature_extractor": None, "image_encoder": None},
}
# Library -> classes that model_index.json may name. diffusers imports and calls what it names.
_ALLOWED = {
    "diffusers": {"AutoencoderKL", "UNet2DConditionModel", "SD3Transformer2DModel", *SCHEDULERS},
    "transformers": {
        "BertModel",
        "CLIPFeatureExtractor",
        "CLIPImageProcessor",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPVisionModelWithProjection",
        "SiglipImageProcessor",
        "SiglipVisionModel",
        "T5EncoderModel",
        *tokenizers.KINDS,
    },
    "stable_diffusion": {"StableDiffusionSafetyChecker"},  # left out, so never imported
}
# Fields of config.json for which transformers loads code: of the folder, the Hub or a package.
_CODE_FIELDS = ("attn_implementation", "auto_map", "custom_pipelines", "quantization_config")


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("checkpoint", None, "the .safetensors file", required=True)
    cli.define_path("out", None, "the diffusers folder to write", required=True)
    cli.define_path(
        "config",
        None,
        "a diffusers folder of the family, for its configs and "
        "tokenizers; by default the published one, if the cache of the Hugging "
        "Face Hub has it",
    )
    flags.DEFINE_bool("ema", False, "take the EMA weights of a file that has both")


def convert_single_file(
    checkpoint: Path, out: Path, config: Path | None = None, ema: bool = False
) -> str:
    """Write the folder `out` in the checkpoint's dtype; return the class of its pipeline.

    For a checkpoint of several dtypes, use the narrowest dtype that holds all of them. Omit T5 if
    the checkpoint lacks it. With `ema`, take the EMA weights of the network. Raise InputError, and
    write nothing, if the checkpoint is incomplete, its family is not supported, or `config` belongs
    to another family.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another --out")
    check_writable(out)
    file = _open(checkpoint)
    shapes, dtypes = _read_header(file)
    family = find_family(shapes, checkpoint)
    is_rewritten = single_file.needs_rewrite(file) or ema
    said = None
    if family != "StableDiffusion3Pipeline":
        said = prediction.find(shapes, file.metadata, checkpoint)
    config = config or _cached_config(family)
    index = read_index(config)
    if (found := index["_class_name"]) != family:
        raise InputError(
            f"{checkpoint} is {describe(family)}, --config={config} is "
            f"{describe(found)}: give the configs of the same family"
        )
    left_out = dict(_LEFT_OUT[family])
    _check_config(config, index)
    if family == "StableDiffusion3Pipeline" and _T5 not in shapes:
        left_out |= {"text_encoder_3": None, "tokenizer_3": None}
    for name, entry in index.items():  # without files, transformers makes an empty tokenizer
        if name not in left_out and isinstance(entry, list) and entry[-1] in tokenizers.KINDS:
            tokenizers.load_tokenizer(config / name, entry[-1])

    diffusers, torch = _import()
    with files.building(out) as building:
        _copy_configs(config, building / "config")
        if said is not None:
            prediction.apply(said, building / "config", checkpoint)
        source = checkpoint
        if is_rewritten:
            source = building / "checkpoint.safetensors"
            dtype = np.dtype(getattr(ml_dtypes, _common(dtypes), None) or _common(dtypes))
            single_file.rewrite(file, source, dtype, ema)
        elif single_file.has_ema(file):
            absl_logging.warning(
                "%s holds raw and EMA weights: the raw ones are taken; --ema takes the others",
                checkpoint,
            )
        with _told(checkpoint, config):
            pipeline = getattr(diffusers, family).from_single_file(
                str(source),
                config=str(building / "config"),
                local_files_only=True,
                torch_dtype=getattr(torch, _common(dtypes)),
                **left_out,
            )
        _check_whole(pipeline, checkpoint, config)
        try:
            pipeline.save_pretrained(building / "pipeline")
        except SafetensorError as error:  # safetensors raises this for a full disk
            raise InputError(f"{out} cannot be written ({error}): is the disk full?") from None
        os.replace(building / "pipeline", out)
    return family


def find_family(shapes: Shapes, path: Path) -> str:
    """Return the pipeline class for a checkpoint's keys and shapes.

    Raise InputError for an unsupported checkpoint and for a missing part; messages name `path`.
    """

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in shapes)

    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    supported = "Stable Diffusion 1.x, SDXL and Stable Diffusion 3 are supported"
    if has("model.diffusion_model.joint_blocks.", "joint_blocks."):
        family = "StableDiffusion3Pipeline"
    elif first is None:
        example = min(shapes, default="nothing")
        raise InputError(
            f"{path} is not a single-file checkpoint of a pipeline (it holds "
            f"{example}): {supported}"
        )
    elif first[1:2] != (4,):
        raise InputError(
            f"{path} is a checkpoint for inpainting or editing: its UNet reads "
            f"{first[1]} channels, not 4"
        )
    elif has("conditioner.embedders.1.model."):
        family = "StableDiffusionXLPipeline"
    elif has("conditioner.embedders.0.model."):
        raise InputError(f"{path} is SDXL's refiner: {supported}")
    elif has("cond_stage_model.model."):
        raise InputError(f"{path} is Stable Diffusion 2.x: {supported}")
    else:
        family = "StableDiffusionPipeline"
    for part, prefixes in _FAMILIES[family][1].items():
        if not has(*prefixes):
            advice = (
                ": use the file with incl_clips in its name"
                if family == "StableDiffusion3Pipeline"
                else ": use the complete checkpoint"
            )
            raise InputError(f"{path} ({describe(family)}) has no {part}{advice}")
    return family


def _open(path: Path) -> TensorFile:
    check_regular(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    check_not_pointer(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip or is_pickle(path):
        raise InputError(
            f"{path} is {A_PICKLE}: get the checkpoint as .safetensors; most exist in this format"
        )
    return TensorFile(path)


def _read_header(file: TensorFile) -> tuple[Shapes, set[str]]:
    """Return shapes by key, and the dtypes of the floating-point weights."""
    return (
        {key: tensor.shape for key, tensor in file.tensors.items()},
        {
            tensor.dtype
            for key, tensor in file.tensors.items()
            if "float" in tensor.dtype and single_file.is_weight(key) and tensor.shape != (0,)
        },
    )


def _common(dtypes: set[str]) -> str:
    """Return the narrowest supported dtype that holds all of `dtypes`."""
    if dtypes & {"float64", "float32"} or {"float16", "bfloat16"} <= dtypes:
        return "float32"
    return "bfloat16" if "bfloat16" in dtypes else "float16"


def _cached_config(family: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    published = _FAMILIES[family][0]
    try:
        return Path(snapshot_download(published, local_files_only=True))
    except LocalEntryNotFoundError:
        raise InputError(
            f"a checkpoint holds no configs and no tokenizers: give --config=DIR, a diffusers "
            f"folder of {describe(family)} such as {published} on the Hugging Face Hub; its "
            "JSON and TXT files are enough (model_index.json and one folder per part)"
        ) from None


def _check_config(config: Path, index: Mapping[str, Any]) -> None:
    """Check all that the folder names before diffusers reads it; raise InputError that names it."""
    for part, entry in index.items():
        if part.startswith("_") and not isinstance(entry, list):
            continue
        if entry is None or isinstance(entry, bool | int | float):
            continue
        library, name = entry if isinstance(entry, list) else ("", None)
        if library is not None and name not in _ALLOWED.get(library, ()):
            raise InputError(
                f"{config}/model_index.json: {part} is {json.dumps(entry)}, which is not a known "
                "part of a pipeline; it is not imported"
            )
    for path in _config_files(config):
        check_link(path, config)
        check_regular(path)
        if path.name.endswith("config.json") and (field := _find_code(read_json(path))):
            raise InputError(
                f"{path}: {field} names code to load, which is never run: remove the field"
            )


def _find_code(value: Any) -> str | None:
    """Return a field in a JSON value that makes transformers load code, else None."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            for field, child in value.items():
                if child is not None and field.strip("_").removesuffix("_internal") in _CODE_FIELDS:
                    return field
            values += value.values()
    return None


def _config_files(folder: Path) -> list[Path]:
    """Return the files of a diffusers folder and its parts without weights."""
    parts = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return sorted(
        path
        for part in parts
        for path in part.iterdir()
        if path.name.endswith((".json", ".txt", ".model"))
        and ".index." not in path.name
        and path.exists()
        and not path.is_dir()
    )


def _copy_configs(source: Path, target: Path) -> None:
    """Copy a diffusers folder without its weights, which could replace a missing part."""
    for path in _config_files(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, copied, source)


def _import():
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise InputError(
            f"reading single files needs diffusers and torch, and {error.name} is not "
            "installed: pip install 'r0_jax[convert]'"
        ) from None
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_warning()  # `_told` reads its warnings of unused weights
    return diffusers, torch


@contextlib.contextmanager
def _told(checkpoint: Path, config: Path) -> Iterator[None]:
    """Turn diffusers' errors and warnings about a checkpoint into InputError; drop other output."""
    logger, unused = logging.getLogger("diffusers"), []
    handlers, collector = logger.handlers[:], logging.Handler()
    collector.emit = lambda record: unused.append(record.getMessage())
    logger.handlers[:] = [collector]
    try:
        yield
    except Exception as error:  # diffusers may raise any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if "meta tensor" in reason:  # torch says this of parameters without values
            reason = "weights that the configs require are missing"
        raise InputError(
            f"diffusers cannot read {checkpoint} with the configs of {config}: {reason}"
        ) from None
    finally:
        logger.handlers[:] = handlers
    for message in unused:
        if "were not used" in message:
            raise InputError(
                f"{checkpoint} does not fit the configs of {config}: "
                f"{' '.join(message.split())[:200]}"
            )


def _check_whole(pipeline, checkpoint: Path, config: Path) -> None:
    for part, module in pipeline.components.items():
        if hasattr(module, "tie_weights"):  # T5's token table has two names
            module.tie_weights()
        for name, value in getattr(module, "state_dict", dict)().items():
            if value.is_meta:
                raise InputError(
                    f"{checkpoint} has no {name} for the {part} of {config}: they "
                    "belong to different models, or the checkpoint is incomplete"
                )


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    family = convert_single_file(
        remote.local(given.checkpoint),
        remote.output(given.out),
        remote.local(given.config) if given.config else None,
        given.ema,
    )
    print(f"{given.out} is {describe(family)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
