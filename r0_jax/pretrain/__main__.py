"""python -m r0_jax.pretrain --config=configs/shapes_base.py:STAGE [--out=DIR]."""

from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.pretrain import clip, decoder, diffusion, preference, text, tokenizer, vae
from r0_jax.shapes import CHECKPOINTS

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", str(CHECKPOINTS), "folder that holds all stages' results")

# In the order in which they need each other.
STAGES: dict[str, Callable[[ConfigDict, Path], None]] = {
    "tokenizer": lambda config, out: tokenizer.build(out, config.model_max_length),
    "vae": vae.train,
    "text_encoder": text.train,
    "unet": diffusion.train,
    "decoder": decoder.train,
    "clip": clip.train,
    "heldout_clip": clip.train,
    "preference": preference.train_preference,
    "aesthetic": preference.train_aesthetic,
}


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if config.stage not in STAGES:
        raise InputError(f"stage {config.stage!r} is unknown; known, in order: {', '.join(STAGES)}")
    STAGES[config.stage](config, Path(_OUT.value))


if __name__ == "__main__":
    cli.run(main)
