"""The embedded world: scenes of coloured shapes, their captions, an exact judge, small models."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"  # trained by `python -m r0_jax.pretrain`
PROMPTS = Path(__file__).parent / "prompts"  # captions.prompts(split, number, seed=0), a file each
