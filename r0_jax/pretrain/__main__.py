"""Trains one stage: python -m r0_jax.pretrain --config=configs/shapes_base.py:STAGE [--out=DIR]."""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

from pathlib import Path

from absl import flags

from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.pretrain.stages import STAGES
from r0_jax.shapes import CHECKPOINTS


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_config()
    cli.define_path("out", str(CHECKPOINTS), "folder of the results of all stages")


def main(argv: list[str]) -> None:
    del argv
    config = flags.FLAGS.config
    if config.stage not in STAGES:
        raise InputError(f"stage {config.stage!r} is unknown; known, in order: {', '.join(STAGES)}")
    STAGES[config.stage](config, Path(flags.FLAGS.out))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
