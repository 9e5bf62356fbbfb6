"""python -m r0_jax.pretrain --config=configs/shapes_base.py:STAGE [--out=DIR]."""

from pathlib import Path

from absl import flags

from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.pretrain.stages import STAGES
from r0_jax.shapes import CHECKPOINTS

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", str(CHECKPOINTS), "folder that holds all stages' results")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if config.stage not in STAGES:
        raise InputError(f"stage {config.stage!r} is unknown; known, in order: {', '.join(STAGES)}")
    STAGES[config.stage](config, Path(_OUT.value))


if __name__ == "__main__":
    cli.run(main)
