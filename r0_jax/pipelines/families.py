"""Load the pipeline of any supported diffusers folder."""

from pathlib import Path

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl, z_image
from r0_jax.pipelines.folder import FAMILIES, describe, read_index
from r0_jax.pipelines.pipeline import Pipeline

_LOAD = {
    "StableDiffusionPipeline": stable_diffusion.load,
    "StableDiffusionXLPipeline": stable_diffusion_xl.load,
    "StableDiffusion3Pipeline": stable_diffusion_3.load,
    "ZImagePipeline": z_image.load,
}
# Where to get the weights.
_SOURCES = {
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face "
    "Hub or, for Chinese prompts, a folder made of IDEA-CCNL/"
    "Taiyi-Stable-Diffusion-1B-Chinese-v0.1 as configs/taiyi_r0.py says",
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0 on the Hugging Face Hub",
    "StableDiffusion3Pipeline": "stabilityai/stable-diffusion-3-medium-diffusers on the Hugging "
    "Face Hub, which is gated: log in there and accept its licence "
    "first, or the download fails (text_encoder_3 and "
    "tokenizer_3, 9.5 GB, are optional)",
    "ZImagePipeline": "Tongyi-MAI/Z-Image or Tongyi-MAI/Z-Image-Turbo on the Hugging Face Hub",
}


def load(
    folder: str | Path,
    dtype: str = "float32",
    family: str = "",
    *,
    text: bool = True,
    images: bool = True,
) -> Pipeline:
    """Read a diffusers folder of a supported family.

    Parameters stay in their files until `lazy.place` reads them as `dtype`.

    Args:
      family: the class of diffusers that the folder must have; "" for any.
      text: read text encoders and tokenizers. Without them prompts are given as embeddings.
      images: read the weights of all other parts; otherwise only their configs.
    Raises:
      InputError: the folder is of another family, or a part is missing or broken.
    """
    folder = remote.local(folder)
    found = read_index(folder)["_class_name"]
    if family and found != family:
        raise InputError(
            f"this folder is {describe(found)}, the config is for {describe(family)}: "
            f"give another recipe, or another folder than {folder}"
        )
    return _LOAD[found](folder, dtype, text, images)


def check_family(family: str) -> None:
    """Raise InputError unless `family` is a supported class of diffusers or ""."""
    if family and family not in FAMILIES:
        raise InputError(
            f"family={family!r} is unknown; known: {', '.join(FAMILIES)}, or '' for any of them"
        )


def check_there(folder: str, family: str) -> None:
    """Raise InputError, which says what to put where, if there is no pretrained pipeline."""
    check_family(family)
    if folder and remote.has_file(folder, "model_index.json"):
        return
    problem = f"{folder} holds no model_index.json" if folder else "pretrained is not set"
    wanted = describe(family) if family else "a supported family"
    source = f" It is, for example, {_SOURCES[family]}." if family else ""
    raise InputError(
        f"{problem}: give --config.pretrained=DIR, the diffusers folder of {wanted}, which holds "
        "model_index.json and a folder a part with its config.json and .safetensors files "
        f"(single-file checkpoints and pickles are not read).{source}"
    )
