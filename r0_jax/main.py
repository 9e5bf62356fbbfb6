"""Trains a few-step generator: python -m r0_jax.main --config=configs/X.py --workdir=W.

Everything that can be imported and tested is in train.py and what it calls.
"""

import os
from pathlib import Path

import jax
from absl import flags

from r0_jax import cli, train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run", required=True)


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    cache = config.compilation_cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"),
                                             "r0_jax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    train.train_and_evaluate(config, Path(_WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
