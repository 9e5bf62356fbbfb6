"""The embedded world: scenes of coloured shapes, captions, an exact judge and small models."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"  # trained by `python -m r0_jax.pretrain`
PROMPTS = Path(__file__).parent / "prompts"  # captions.prompts(split, number, seed=0), one per file
