"""Trains a few-step generator: python -m r0_jax.main --config=configs/X.py --workdir=W.

Here are only its flags and its exit status; the rest is in training/train.py.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

from pathlib import Path

from absl import flags

from r0_jax import cli, compilation_cache
from r0_jax.console import console
from r0_jax.errors import STOPPED
from r0_jax.parallel import distributed
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.training import train
from r0_jax.workdir import mirror


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_config()
    cli.define_path(
        "workdir",
        None,
        "folder of this run, also in gs:// or s3://; by "
        "default runs/ and the name of the config with its argument",
    )


def main(argv: list[str]) -> int:
    del argv
    config = flags.FLAGS.config
    asked = flags.FLAGS.workdir or Path("runs", cli.config_name())
    try:
        with StopSignal() as stop, distributed.joined(config):
            compilation_cache.keep(config.compilation_cache)
            with mirror.workdir(asked, training=True) as workdir:
                ended = train.train_and_evaluate(config, workdir, stop)
                stop.defer()  # the store may still miss something
    except Stopped:
        console.print("stopped; what was trained is saved: the same command continues")
        ended = False
    # Kubernetes and SLURM, which start runs again, would take 0 for the end of the training.
    return 0 if ended else STOPPED


if __name__ == "__main__":
    define_flags()
    cli.run(main)
