"""Times the whole train step beside a twin of it in PyTorch, with the same weights and noise:

    python -m benchmarks.step --out=docs/reports/performance.md

The twin runs the networks of diffusers and transformers. The two take turns, each in a process of
its own. A way to run PyTorch whose first step differs from ours is reported, and not timed.
Linux only.
"""

import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from benchmarks import measure
from benchmarks.fullsize import watch
from benchmarks.step import agreement, report
from benchmarks.step.report import Pair, Timing
from benchmarks.step.turns import Worker
from benchmarks.step.variants import VARIANTS
from configs import shapes_r0
from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.files import write_bytes


def define_flags() -> None:
    flags.DEFINE_enum("method", "r0", ["r0", "r0plus"], "how images are rewarded")
    flags.DEFINE_integer("batch", 32, "images of a step", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "of a round", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "that are timed", lower_bound=1)
    flags.DEFINE_multi_enum(
        "variant",
        list(VARIANTS),
        list(VARIANTS),
        "ways to run PyTorch; repeat the flag for several",
    )
    cli.define_path("out", None, "Markdown file for the section; printed by default")


def configure(method: str, batch: int, steps: int) -> ConfigDict:
    """Return the recipe with what a benchmark of `steps` steps reads, and no more."""
    config = shapes_r0.get_config(method)
    config.batch_size, config.steps = batch, steps
    with config.unlocked():
        config.heldout_rewards = ConfigDict()
    config.test.prompts = ""
    return config


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory is read from /proc, which only Linux has")
    config = configure(given.method, given.batch, 1 + given.steps * (1 + given.rounds))
    pairs, broken = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_bytes(Path(folder, "config.json"), config.to_json().encode())
        with Worker("benchmarks.step.ours", folder) as ours:
            first = ours.first()
            start = watch.peak(ours.process.pid)
            for variant in given.variant:
                try:
                    with Worker("benchmarks.step.twin", folder, variant) as twin:
                        pairs.append(pair(variant, Timing(first, [], start, 0), ours, twin, folder))
                except InputError as error:  # a compiler of PyTorch may not work on this machine
                    print(f"PyTorch, {variant}: {error}", file=sys.stderr)
                    broken.append(variant)
    if not pairs:
        raise InputError("no way to run PyTorch worked: see above")
    recipe = "configs/shapes_r0.py" + ("" if given.method == "r0" else f":{given.method}")
    section = report.text(pairs, broken, config, recipe, given.rounds, given.steps)
    measure.publish(given.out, report.heading(config), section)


def pair(variant: str, of_ours: Timing, ours: Worker, twin: Worker, folder: str) -> Pair:
    """Let a twin take its first step; if it agrees, let both take turns."""
    first = twin.first()
    agreed = agreement.compare(of_ours.first, first, Path(folder))
    print(f"PyTorch, {variant}: {agreed}", file=sys.stderr)
    of_twin = Timing(first, [], watch.peak(twin.process.pid), 0)
    if not agreed.holds:
        return Pair(variant, of_ours, of_twin, agreed)
    given, sides = flags.FLAGS, (ours, twin)
    seconds: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side.run(1, given.steps)
        watch.clear_peak(side.process.pid)
    for i in range(1, 1 + given.rounds):
        for side, taken in zip(sides, seconds, strict=True):
            taken.append(side.run(1 + i * given.steps, given.steps) / given.steps)
    of_ours, of_twin = (
        timing._replace(seconds=taken, peak=watch.peak(side.process.pid))
        for timing, taken, side in zip((of_ours, of_twin), seconds, sides, strict=True)
    )
    return Pair(variant, of_ours, of_twin, agreed)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
