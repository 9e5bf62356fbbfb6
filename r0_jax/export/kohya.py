"""Adapters in the format of kohya's sd-scripts, for ComfyUI, A1111 and Forge.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    SD 1, 2: names of diffusers
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight              SDXL: names of sgm
    ....lora_up.weight, ....alpha

Readers scale each pair by alpha / rank, so the files hold the alpha of the training. sgm is
Stability AI's generative-models; sd-scripts trains its UNet for SDXL.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from r0_jax.errors import InputError
from r0_jax.pipelines.folder import describe
from r0_jax.weights import convert
from r0_jax.workdir.run import HostParams, Run

Tensors = dict[str, Shaped[np.ndarray, "..."]]

_FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_WIDTH_2 = 1024  # text encoder width of Stable Diffusion 2.x; 1.x has the same class but 768
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\."
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def supports(family: str) -> bool:
    """Return whether kohya's format has names for a class of pipelines."""
    return family in _FAMILIES


def check_family(family: str) -> None:
    """Check that kohya's format supports a class of pipelines; raise InputError if not."""
    if not supports(family):
        raise InputError(
            f"--format=kohya is for Stable Diffusion 1.x, 2.x and SDXL, not for "
            f"{describe(family)}: use --format=peft, which ComfyUI reads too"
        )


def write(run: Run, params: HostParams, path: Path, dtype: str, step: int, base_model: str) -> None:
    """Write the adapters `params` of the step `step` as one safetensors file.

    The metadata calls the pretrained pipeline `base_model`. Raise InputError if the format has no
    name for an adapted module.
    """
    written = tensors(run, params, dtype)
    convert.save_tensors(written, path, metadata(run, written, path.stem, step, base_model))


def tensors(run: Run, params: HostParams, dtype: str) -> Tensors:
    """Return {key: value} of the file; alphas are float32, which holds more values exactly."""
    xl = _family(run) == "StableDiffusionXLPipeline"
    layers = run.pipeline.networks["unet"].config.per_level("layers_per_block")
    found = {}
    for name, value in params.items():
        module, factor = name.removesuffix(".kernel").rsplit(".", 1)
        key = module_key(module, layers, xl)
        side = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
        found[f"{key}.{side}.weight"] = np.asarray(
            convert.to_checkpoint(name, np.asarray(value)), convert.DTYPES[dtype], order="C"
        )
        found[f"{key}.alpha"] = np.asarray(run.generator.alpha, np.float32)
    return dict(sorted(found.items()))


def module_key(module: str, layers: Sequence[int], xl: bool) -> str:
    """Return the key of a UNet module, without the suffix of the tensor.

    Args:
      module: its name in diffusers.
      layers: resnets per level of the encoder; the decoder has one more per level.
      xl: whether to use SDXL's names.

    Raises:
      InputError: the format has no name for the module.
    """
    sgm = _sgm_name(module, layers)
    if sgm is None:
        raise InputError(
            f"kohya's files have no name for {module}: use --format=peft, or train "
            "with lora.targets that exclude it"
        )
    return "lora_unet_" + (sgm if xl else module).replace(".", "_")


def _sgm_name(module: str, layers: Sequence[int]) -> str | None:
    """Return the sgm name of a diffusers module, or None if it has none.

    This follows `make_unet_conversion_map` of sd-scripts. sgm lists all layers of a side in one
    list. A downsampler is an element of its own; an upsampler is the last part of an element.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    if not (match := _BLOCK.fullmatch(module)):
        return None
    side, level, kind, number, rest = match.groups()
    level, number = int(level or 0), int(number)
    attention = int(kind == "attentions")
    if kind == "resnets":
        if rest not in _RESNET:
            return None
        rest = _RESNET[rest]
    if side is None:
        return f"middle_block.{2 * number + attention}.{rest}"
    if side == "down":
        first = 1 + sum(n + 1 for n in layers[:level])
        if kind == "downsamplers":
            return f"input_blocks.{first + layers[level]}.0.op"
        return f"input_blocks.{first + number}.{attention}.{rest}"
    layers = layers[::-1]
    first = sum(n + 1 for n in layers[:level])
    if kind == "upsamplers":
        return f"output_blocks.{first + layers[level]}.2.conv"
    return f"output_blocks.{first + number}.{attention}.{rest}"


def metadata(run: Run, written: Tensors, name: str, step: int, base_model: str) -> dict[str, str]:
    """Return the metadata of the file: sd-scripts' `ss_...` and the `modelspec...` fields.

    The latter follow ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec).
    """
    version, architecture, implementation = _base(run)
    height, width, _ = run.pipeline.image_shape
    steps, adapter = run.config.sampler.num_steps, run.generator
    windows = any(value.shape[2:] > (1, 1) for value in written.values())
    digest = data_hash(written)
    title = f"{base_model.rstrip('/').split('/')[-1]} in {steps} steps"
    said = {
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": adapter.alpha,
        # networks.lora skips convolutions larger than 1 x 1 without these arguments.
        "ss_network_args": json.dumps(
            {"conv_dim": adapter.rank, "conv_alpha": adapter.alpha} if windows else {}
        ),
        "ss_base_model_version": version,
        "ss_sd_model_name": base_model,
        "ss_v2": version.startswith("sd_v2"),
        "ss_resolution": (width, height),
        "ss_steps": step,
        "ss_max_train_steps": run.config.steps,
        "ss_total_batch_size": run.config.batch_size,
        "ss_seed": run.config.seed,
        "ss_training_comment": f"regularized reward maximization, {run.config.objective.method}",
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.description": f"Draws with {base_model} in {steps} steps {run.guidance}, "
        "made by regularized reward maximization (R0).",
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.usage_hint": f"Strength 1, {steps} steps, CFG scale "
        f"{run.config.sampler.guidance_scale:g}, sampler Euler, schedule Simple.",
        "modelspec.tags": "few-step",
        "modelspec.prediction_type": _prediction(run),
    }
    return {key: str(value) for key, value in said.items()}


def data_hash(written: Tensors) -> str:
    """Return the SHA-256 of the data in a safetensors file of these tensors, without its header."""
    digest = hashlib.sha256()
    for key in sorted(written, key=lambda key: (-written[key].itemsize, key)):  # the file's order
        digest.update(written[key].tobytes())
    return digest.hexdigest()


def _base(run: Run) -> tuple[str, str, str]:
    """Return sd-scripts' ss_base_model_version, ModelSpec's architecture and implementation."""
    if _family(run) == "StableDiffusionXLPipeline":
        return (
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
            "https://github.com/Stability-AI/generative-models",
        )
    predicts_v = _prediction(run) == "v"
    if run.pipeline.networks["unet"].config.cross_attention_dim == _WIDTH_2:
        return (
            ("sd_v2_v", "stable-diffusion-v2-768-v", "diffusers")
            if predicts_v
            else ("sd_v2", "stable-diffusion-v2-512", "diffusers")
        )
    return "sd_v1_v" if predicts_v else "sd_v1", "stable-diffusion-v1", "diffusers"


def _family(run: Run) -> str:
    return type(run.pipeline).__name__  # named as in diffusers


def _prediction(run: Run) -> str:
    kind = run.scheduler_config.noise.prediction_type
    return "v" if kind == "v_prediction" else kind
