"""Families, the formats that clients read of them, and where the files of a family lie."""

from pathlib import Path
from typing import NamedTuple


class Family(NamedTuple):
    """A model family.

    Attributes:
      title: its name for people.
      kind: its class of diffusers.
      published: the name of the model whose configs it has.
      checkpoint: what ComfyUI's workflow calls its single file.
      targets: the layers that get an adapter.
      formats: those that it is exported in.
    """

    title: str
    kind: str
    published: str
    checkpoint: str
    targets: str
    formats: tuple[str, ...]

    @property
    def part(self) -> str:
        """Return the folder of the trained network."""
        return "transformer" if self.kind == "StableDiffusion3Pipeline" else "unet"


_EVERY_BLOCK = r"(down_blocks|mid_block|up_blocks)\..*"  # all that sd-scripts knows adapters of
FAMILIES = {
    "sd15": Family(
        "Stable Diffusion 1.5",
        "StableDiffusionPipeline",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "v1-5-pruned-emaonly",
        _EVERY_BLOCK,
        ("diffusers", "peft", "kohya"),
    ),
    "sdxl": Family(
        "SDXL",
        "StableDiffusionXLPipeline",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sd_xl_base_1.0",
        _EVERY_BLOCK,
        ("diffusers", "peft", "kohya"),
    ),
    "sd3": Family(
        "Stable Diffusion 3 medium, without T5",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "sd3_medium",
        r"transformer_blocks\..*\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))",
        ("diffusers", "peft"),
    ),
}


class Places(NamedTuple):
    """Where the files of a family lie; what is in `models` goes at the end."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def pipeline(self) -> Path:
        return self.models / "pipeline"

    @property
    def single(self) -> Path:
        """Return the same weights in a single file."""
        return self.models / "single.safetensors"

    @property
    def run(self) -> Path:
        return self.models / "run"

    @property
    def adapters(self) -> Path:
        """Return the run's adapters, which no export has touched."""
        return self.models / "adapters.safetensors"

    @property
    def done(self) -> Path:
        """Return the file that says that the models are complete."""
        return self.models / "done"

    def export(self, form: str) -> Path:
        return self.models / form

    def exported_file(self, form: str, part: str) -> Path:
        """Return the safetensors file of the trained network, or of its adapters."""
        if form == "diffusers":
            return self.export(form) / part / "diffusion_pytorch_model.safetensors"
        name = f"{form}.safetensors" if form == "kohya" else "pytorch_lora_weights.safetensors"
        return self.export(form) / name

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.png"
