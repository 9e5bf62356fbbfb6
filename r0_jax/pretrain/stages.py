"""The stages of pretraining."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from r0_jax.pretrain import clip, decoder, diffusion, preference, text, tokenizer, vae

# In order: each stage needs earlier ones.
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
