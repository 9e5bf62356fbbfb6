"""A ComfyUI workflow that draws with an export on the trained grid.

The file is a graph of ComfyUI's user interface (version 0.4); users drop it onto the canvas. It
uses only nodes that ComfyUI includes, and lists each sigma. ComfyUI scales latents so that alpha
is 1; an Euler step between two sigmas is then training's DDIM step without noise. Its `lcm` step
draws all noise anew, as training does with eta 1.

Two things differ from diffusers. ComfyUI pads T5's tokens to 77, not to 256. For a missing text
encoder it uses no tokens, where diffusers uses zeros.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from r0_jax.diffusion import grid
from r0_jax.diffusion.noise_schedule import FlowMatching
from r0_jax.workdir.run import Run

FILE = "comfyui_workflow.json"

# Node -> (name and type of each input, widgets in order, types of the outputs).
NODES: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({}, ("ckpt_name",), ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({}, ("unet_name", "weight_dtype"), ("MODEL",)),
    "CLIPLoader": ({}, ("clip_name", "type", "device"), ("CLIP",)),
    "DualCLIPLoader": ({}, ("clip_name1", "clip_name2", "type", "device"), ("CLIP",)),
    "TripleCLIPLoader": ({}, ("clip_name1", "clip_name2", "clip_name3"), ("CLIP",)),
    "VAELoader": ({}, ("vae_name",), ("VAE",)),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ("lora_name", "strength_model"), ("MODEL",)),
    "ModelSamplingSD3": ({"model": "MODEL"}, ("shift",), ("MODEL",)),
    "ModelSamplingAuraFlow": ({"model": "MODEL"}, ("shift",), ("MODEL",)),
    "ModelSamplingDiscrete": ({"model": "MODEL"}, ("sampling", "zsnr"), ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("text",), ("CONDITIONING",)),
    "EmptyLatentImage": ({}, ("width", "height", "batch_size"), ("LATENT",)),
    "EmptySD3LatentImage": ({}, ("width", "height", "batch_size"), ("LATENT",)),
    "KSamplerSelect": ({}, ("sampler_name",), ("SAMPLER",)),
    "ManualSigmas": ({}, ("sigmas",), ("SIGMAS",)),
    "SamplerCustom": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("add_noise", "noise_seed", "control_after_generate", "cfg"),
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, (), ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE"}, ("filename_prefix",), ()),
    "Note": ({}, ("text",), ()),
}
# ComfyUI's noise schedule for SD 1.x and SDXL; a workflow cannot set another one.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
_SAMPLING = {"v_prediction": "v_prediction", "sample": "x0"}  # ComfyUI's default is "epsilon"
# ComfyUI's sigma for zero signal (rescale_betas_zero_snr), where it would be infinite.
_MOST_NOISE = math.sqrt(1 / 4.8973451890853435e-08 - 1)
# Base model -> the usual name of its single-file checkpoint.
_CHECKPOINTS = {
    "stable-diffusion-v1-5": "v1-5-pruned-emaonly.safetensors",
    "stable-diffusion-xl-base-1.0": "sd_xl_base_1.0.safetensors",
    "stable-diffusion-3-medium-diffusers": "sd3_medium.safetensors",
}
# The same for networks that ComfyUI reads apart from encoders and VAE.
_NETWORKS = {
    "Z-Image": "z_image_bf16.safetensors",
    "Z-Image-Turbo": "z_image_turbo_bf16.safetensors",
}
_VAE = "ae.safetensors"  # of these, FLUX.1's
_ENCODERS = {
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "clip_g.safetensors",
    "text_encoder_3": "t5xxl_fp16.safetensors",
}
_QWEN3 = "qwen_3_4b.safetensors"
_CLIP_TYPES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "ZImagePipeline": "lumina2",  # whose architecture Z-Image's transformer has there
}
# Class of the pipeline -> the node that sets its shift.
_SHIFTS = {
    "StableDiffusion3Pipeline": "ModelSamplingSD3",
    "ZImagePipeline": "ModelSamplingAuraFlow",
}


@dataclasses.dataclass(frozen=True)
class _Output:
    node: int
    slot: int


class _Graph:
    """Nodes and links of a workflow, in the order of adding them; columns go from left to right."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self._bottoms: dict[int, int] = {}

    def add(self, column: int, kind: str, title: str = "", **values: Any) -> list[_Output]:
        """Add a node of `NODES`, with a value for each input and widget; return its outputs."""
        inputs, widgets, outputs = NODES[kind]
        if values.keys() != {*inputs, *widgets}:
            raise ValueError(f"{kind} takes {[*inputs, *widgets]}, not {[*values]}")
        number, top = len(self.nodes) + 1, self._bottoms.get(column, 0)
        rows = max(len(inputs), len(outputs)) + len(widgets) + 5 * ("text" in widgets)
        height = 60 + 26 * rows
        self._bottoms[column] = top + height + 40
        node = {
            "id": number,
            "type": kind,
            "pos": [380 * column, top],
            "size": [330, height],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [
                {"name": name, "type": type_, "link": self._link(values[name], number, slot)}
                for slot, (name, type_) in enumerate(inputs.items())
            ],
            "outputs": [
                {"name": type_, "type": type_, "links": [], "slot_index": slot}
                for slot, type_ in enumerate(outputs)
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [values[name] for name in widgets],
        }
        self.nodes.append(node | ({"title": title} if title else {}))
        return [_Output(number, slot) for slot in range(len(outputs))]

    def _link(self, source: _Output, node: int, slot: int) -> int:
        output = self.nodes[source.node - 1]["outputs"][source.slot]
        number = len(self.links) + 1
        self.links.append([number, source.node, source.slot, node, slot, output["type"]])
        output["links"].append(number)
        return number

    def to_json(self) -> dict[str, Any]:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def why_not(run: Run, form: str, folder: Path) -> str:
    """Return why ComfyUI cannot use an export in the format `form`, or "" if it can.

    `folder` is the export. The text continues a sentence about ComfyUI: "it does not support BERT".
    """
    pipeline, noise = run.pipeline, run.pipeline.scheduler_config.noise
    if "BertModel" in _parts(run).values():
        return "it does not support BERT as a text encoder"
    if form == "peft" and pipeline.generator_part == "unet":
        return "it reads a UNet's LoRA only in the format of `--format=kohya`"
    if form == "diffusers" and not (folder / _network(run)).is_file():
        return "it reads no network in several files; `--one_file` exports it in one"
    known = {"num_train_timesteps": 1000} if pipeline.scheduler_config.is_flow else _NOISE
    wrong = [name for name, value in known.items() if getattr(noise, name) != value]
    return f"it has one noise schedule per family, and {wrong[0]} differs here" if wrong else ""


def _network(run: Run) -> str:
    return f"{run.pipeline.generator_part}/diffusion_pytorch_model.safetensors"


def _parts(run: Run) -> dict[str, str]:
    """Return {part: class} of the pretrained pipeline, including text encoders not loaded."""
    return {
        name: entry[-1]
        for name, entry in run.index.items()
        if isinstance(entry, list) and entry and entry[-1] is not None
    }


def sigmas(run: Run) -> Float[np.ndarray, " levels"]:
    """Return the noise levels of the trained grid in ComfyUI's terms, float32; the last is 0.

    For flow matching they are the shifted levels, from 1 down. For other schedules they are the
    ratio of noise to signal.
    """
    config = run.pipeline.scheduler_config
    trained = grid.grid(config, run.config.sampler.num_steps, run.config.sampler.eta)
    levels = trained.sigmas
    if not config.is_flow:
        with np.errstate(divide="ignore"):
            levels = np.minimum(trained.sigmas / trained.alphas, _MOST_NOISE)
    return np.append(levels, 0).astype(np.float32)


def workflow(
    run: Run, form: str, folder: Path, name: str, base_model: str, prompt: str
) -> dict[str, Any]:
    """Return the workflow as a JSON object; call this only if `why_not` returns "".

    Args:
      folder: the export, complete except for the workflow; its final name is `name`.
      base_model: the name of the pretrained pipeline for users.
      prompt: the positive prompt.
    """
    graph, noise = _Graph(), run.pipeline.scheduler_config.noise
    model, clip, vae, told = _load(graph, run, form, folder, name, base_model)
    size = {"width": run.pipeline.image_shape[1], "height": run.pipeline.image_shape[0]}
    if isinstance(noise, FlowMatching):
        node = _SHIFTS[_family(run)]
        (model,) = graph.add(1, node, model=model, shift=round(noise.shift, 6))
        (latents,) = graph.add(2, "EmptySD3LatentImage", **size, batch_size=1)
    else:
        if sampling := _SAMPLING.get(noise.prediction_type):
            (model,) = graph.add(
                1,
                "ModelSamplingDiscrete",
                model=model,
                sampling=sampling,
                zsnr=noise.rescale_betas_zero_snr,
            )
        (latents,) = graph.add(2, "EmptyLatentImage", **size, batch_size=1)
    (positive,) = graph.add(1, "CLIPTextEncode", clip=clip, text=prompt)
    guidance_scale = run.config.sampler.guidance_scale
    title = "Negative, unused at cfg 1" if guidance_scale == 1 else "Negative, empty as in training"
    (negative,) = graph.add(1, "CLIPTextEncode", title, clip=clip, text="")
    name_there = "lcm" if run.config.sampler.eta == 1 else "euler"
    (sampler,) = graph.add(2, "KSamplerSelect", sampler_name=name_there)
    listed = ", ".join(np.format_float_positional(sigma, trim="-") for sigma in sigmas(run))
    (levels,) = graph.add(2, "ManualSigmas", "The trained grid", sigmas=listed)
    samples, _ = graph.add(
        3,
        "SamplerCustom",
        model=model,
        positive=positive,
        negative=negative,
        sampler=sampler,
        sigmas=levels,
        latent_image=latents,
        add_noise=True,
        noise_seed=0,
        control_after_generate="randomize",
        cfg=float(guidance_scale),
    )
    (image,) = graph.add(4, "VAEDecode", samples=samples, vae=vae)
    graph.add(4, "SaveImage", images=image, filename_prefix=name)
    graph.add(0, "Note", "Where files go", text=f"{told}\n\n{_older(run)}".strip())
    return graph.to_json()


def _load(
    graph: _Graph, run: Run, form: str, folder: Path, name: str, base_model: str
) -> tuple[_Output, _Output, _Output, str]:
    """Add the loaders; return model, CLIP, VAE, and a note: where to put files in models/."""
    part = run.pipeline.generator_part
    if form == "diffusers":
        (model,) = graph.add(
            0, "UNETLoader", weight_dtype="default", unet_name=f"{name}/{_network(run)}"
        )
        (vae,) = graph.add(
            0, "VAELoader", vae_name=f"{name}/vae/diffusion_pytorch_model.safetensors"
        )
        clip = _load_clip(graph, run, folder, name)
        return (
            model,
            clip,
            vae,
            (
                f"Put {name}, or a link to it, into models/diffusion_models, "
                "models/text_encoders and models/vae."
            ),
        )
    base = base_model.rstrip("/").split("/")[-1]
    if _family(run) == "ZImagePipeline":  # ComfyUI has no whole checkpoints of it
        network = _NETWORKS.get(base, f"{base}.safetensors")
        (model,) = graph.add(0, "UNETLoader", weight_dtype="default", unet_name=network)
        (vae,) = graph.add(0, "VAELoader", vae_name=_VAE)
        clip = _load_clip(graph, run, None, name)
        whole = f"the parts of {base_model} into models/diffusion_models, text_encoders and vae"
    else:
        model, clip, vae = graph.add(
            0, "CheckpointLoaderSimple", ckpt_name=_CHECKPOINTS.get(base, f"{base}.safetensors")
        )
        if part == "transformer":  # its checkpoints may lack text encoders
            clip = _load_clip(graph, run, None, name)
        whole = f"the whole checkpoint of {base_model} into models/checkpoints"
    file = f"{name}.safetensors" if form == "kohya" else f"{name}/pytorch_lora_weights.safetensors"
    (model,) = graph.add(0, "LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)
    return model, clip, vae, f"Put {file.split('/')[0]} into models/loras and {whole}."


def _load_clip(graph: _Graph, run: Run, folder: Path | None, name: str) -> _Output:
    """Add a loader of the run's text encoders; return its CLIP.

    ComfyUI reads encoders from single files. Use a single file in `folder`, else the usual name.
    """
    usual = {"text_encoder": _QWEN3} if _family(run) == "ZImagePipeline" else _ENCODERS
    files = [
        f"{name}/{part}/model.safetensors"
        if folder and (folder / part / "model.safetensors").is_file()
        else usual[part]
        for part in usual
        if part in _parts(run)
    ]
    kind = _CLIP_TYPES[_family(run)]
    match files:
        case [one]:
            return graph.add(0, "CLIPLoader", clip_name=one, type=kind, device="default")[0]
        case [one, two]:
            return graph.add(
                0, "DualCLIPLoader", clip_name1=one, clip_name2=two, type=kind, device="default"
            )[0]
    return graph.add(
        0, "TripleCLIPLoader", clip_name1=files[0], clip_name2=files[1], clip_name3=files[2]
    )[0]


def _family(run: Run) -> str:
    return type(run.pipeline).__name__  # named as in diffusers


def _older(run: Run) -> str:
    """Return a note on a replacement for ManualSigmas; "" if there is none."""
    steps = run.config.sampler.num_steps
    if 1000 % steps:
        return ""
    return (
        "A ComfyUI from before 2026 may have no ManualSigmas: BasicScheduler with scheduler "
        f"simple, steps {steps} and denoise 1 gives the same sigmas."
    )
