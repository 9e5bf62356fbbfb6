"""Any supported diffusers folder -> its pipeline."""

from pathlib import Path

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from r0_jax.pipelines.folder import FAMILIES, describe, read_index
from r0_jax.pipelines.pipeline import Pipeline

_LOAD = {
    "StableDiffusionPipeline": stable_diffusion.load,
    "StableDiffusionXLPipeline": stable_diffusion_xl.load,
    "StableDiffusion3Pipeline": stable_diffusion_3.load,
}
# Where the weights are, for who has none yet.
_SOURCES = {
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face "
    "Hub or, for Chinese prompts, a folder made of IDEA-CCNL/"
    "Taiyi-Stable-Diffusion-1B-Chinese-v0.1 as configs/taiyi_r0.py says",
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0 on the Hugging Face Hub",
    "StableDiffusion3Pipeline": "stabilityai/stable-diffusion-3-medium-diffusers on the Hugging "
    "Face Hub, which is gated: log in there and accept its licence "
    "first, or the download is refused (text_encoder_3 and "
    "tokenizer_3, 9.5 GB, may be left out)",
}


def load(
    folder: str | Path,
    dtype: str = "float32",
    family: str = "",
    *,
    text: bool = True,
    images: bool = True,
) -> Pipeline:
    """Reads a diffusers folder of a supported family; parameters stay in their files until
    `lazy.place` reads them as `dtype`.

    Args:
      family: the class of diffusers that it must be, "" any.
      text: with text encoders and tokenizers; without, they need not be there, and prompts are
        told as embeddings.
      images: with the weights of all other parts; without, only their configs are read.
    Raises:
      InputError: it is of another family, or a part is missing or broken.
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
    """InputError for what is no family."""
    if family and family not in FAMILIES:
        raise InputError(
            f"family={family!r} is unknown; known: {', '.join(FAMILIES)}, or '' for any of them"
        )


def check_there(folder: str, family: str) -> None:
    """InputError, with what to put where, if there is no pretrained pipeline yet."""
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
