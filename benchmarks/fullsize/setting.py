"""What is run of a family: its recipe, and what is reduced of it on a small machine."""

import json
from pathlib import Path
from typing import NamedTuple

from r0_jax.files import read_json, write_bytes

REWARDS = ("hps_v2_1", "image_reward", "clip_score")  # of the recipes
# What is held out, and the model that it is made of: CLIP ViT-H/14 is PickScore's network.
HELDOUT = {"pickscore": "pickscore", "aesthetic": "aesthetic", "heldout_clip": "pickscore"}
# Without an accelerator: a step at the recipe's size takes hours.
ON_CPU: dict[str, object] = {"size": 256, "batch": 1}


class Family(NamedTuple):
    """A model family.

    Attributes:
      title: its name for people.
      recipe: the file in configs/.
      kind: its class of diffusers.
      formats: those that it is exported in.
      on_cpu: what else is reduced without an accelerator, so that 24 GiB hold it.
    """

    title: str
    recipe: str
    kind: str
    formats: tuple[str, ...]
    on_cpu: dict[str, object] = {}  # noqa: RUF012 (never changed)


FAMILIES = {
    "sd15": Family(
        "Stable Diffusion 1.5",
        "sd15_r0",
        "StableDiffusionPipeline",
        ("diffusers", "peft", "kohya"),
    ),
    "sdxl": Family(
        "SDXL",
        "sdxl_r0",
        "StableDiffusionXLPipeline",
        ("diffusers", "peft", "kohya"),
        # With its text encoders beside the rest, the step was killed at 22.6 GiB.
        {"encoded": True},
    ),
    "sd3": Family(
        "Stable Diffusion 3 medium, without T5",
        "sd3_r0",
        "StableDiffusion3Pipeline",
        ("diffusers", "peft"),
    ),
}


class Setting(NamedTuple):
    """A run of a family.

    Attributes:
      size: pixels of a side; 0 as the recipe has it.
      batch: images of a step, computed one by one; 0 as the recipe has it.
      rewards: those that are trained on.
      encoded: prompts are encoded before, so that training needs no text encoder.
      decoder: a tiny autoencoder decodes for the rewards.
      dtype: of the networks in training; "" as the recipe has it, or as `forward` found it better.
      steps: of the training.
      miniature: all networks are tiny, which tries this command and measures nothing.
      accelerator: whether JAX has one.
    """

    family: str
    size: int = 0
    batch: int = 0
    rewards: list[str] = list(REWARDS)  # noqa: RUF012 (never changed; JSON has lists)
    encoded: bool = False
    decoder: bool = False
    dtype: str = ""
    steps: int = 3
    miniature: bool = False
    accelerator: bool = False

    @property
    def flags(self) -> str:
        """Return the flags that give this setting."""
        usual = Setting(self.family)._asdict()
        changed = {
            name: value
            for name, value in self._asdict().items()
            if value != usual[name] and name not in ("family", "accelerator")
        }
        texts = [
            f"--{name}" if value is True else f"--{name}={_flag(value)}"
            for name, value in changed.items()
        ]
        return " ".join([f"--family={self.family}", *texts])


def _flag(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def read(folder: Path) -> Setting:
    """Return the setting that a family's folder was begun with."""
    return Setting(**read_json(folder / "setting.json"))


def write(folder: Path, setting: Setting) -> None:
    write_bytes(folder / "setting.json", json.dumps(setting._asdict(), indent=1).encode())


class Places(NamedTuple):
    """Where the files of a family lie while it runs; all but the JSON files go at the end."""

    folder: Path

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def pipeline(self) -> Path:
        return self.models / "pipeline"

    @property
    def prompts(self) -> Path:
        return self.models / "prompts.txt"

    @property
    def drawn_prompts(self) -> Path:
        """Return those of which images are drawn and compared."""
        return self.models / "drawn.txt"

    @property
    def noise(self) -> Path:
        return self.models / "noise.npy"

    @property
    def compiled(self) -> Path:
        return self.folder / "compiled"

    @property
    def encoded(self) -> Path:
        return self.folder / "encoded"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"
