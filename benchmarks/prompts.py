"""Measures memory and time of a run's start on a large file of prompts; prints only.

    python -m benchmarks.prompts --captions=4200000

It writes a file of made-up captions. Then it does what `r0_jax.main` does with prompts before step
1, with the tiny pipeline and reward of a dry run. It does so twice: the second start finds all
encoded. Then it reads the batches of all steps. Tiny towers show what files, tokens and bookkeeping
cost; real towers add their own time for each encoded prompt. Linux: memory is the peak so far.
"""

import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from benchmarks import measure
from r0_jax import cli, rewards
from r0_jax.pipelines import families
from r0_jax.prompts.order import Draws
from r0_jax.prompts.text import TextPrompts
from r0_jax.stand_ins import miniature, miniature_reward

WORDS = "a red blue green circle square star left right above below photo painting of the".split()


def define_flags() -> None:
    cli.define_path("folder", tempfile.gettempdir(), "folder for temporary files")
    flags.DEFINE_integer("captions", 1_000_000, "prompts in the file", lower_bound=1)
    flags.DEFINE_integer("steps", 2000, "of the run", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "prompts a step", lower_bound=1)


def captions(count: int) -> Iterator[str]:
    """Yield different captions of about 60 letters."""
    made = random.Random(0)
    for i in range(count):
        yield f"{' '.join(made.choices(WORDS, k=10))}, number {i}"


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    folder = Path(tempfile.mkdtemp(dir=given.folder, prefix="prompts_"))
    draws = Draws(given.batch_size, 0, range(given.steps))
    rows = []

    def measured(name: str, call: Callable[[], object]) -> None:
        begin = time.monotonic()
        call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append([name, f"{time.monotonic() - begin:.1f}", f"{peak:.2f}"])

    try:
        file = folder / "prompts.txt"
        with file.open("w", encoding="utf-8") as out:
            out.writelines(f"{caption}\n" for caption in captions(given.captions))
        miniature.write(folder / "pipeline", "StableDiffusionXLPipeline")
        pipeline = families.load(folder / "pipeline")
        reward = rewards.load("hps_v2_1", miniature_reward.kept_reward("hps_v2_1", 0))
        source = TextPrompts(str(file))

        def start() -> None:
            print(source.prepare(folder / "run", pipeline, [reward], [], draws, False))

        def read() -> None:
            batches = source.batches(folder / "run", pipeline, [reward], draws, [0], 1)
            assert sum(1 for _ in batches) == given.steps

        measured("imports", lambda: None)
        measured("first start", start)
        measured("second start", start)
        measured("all batches", read)
        disk = sum(path.stat().st_size for path in (folder / "run").iterdir())
    finally:
        shutil.rmtree(folder)
    print(measure.table(["", "seconds", "peak GiB"], rows))
    print(f"\n{disk / 1e6:.0f} MB on disk. {measure.machine('jax')}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
