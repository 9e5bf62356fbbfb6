"""The section of docs/reports/performance.md: what each side took."""

import statistics
from typing import NamedTuple

from ml_collections import ConfigDict

from benchmarks import measure
from benchmarks.step.agreement import TOLERANCE, Agreement
from benchmarks.step.turns import First

HEADER = [
    "step",
    "s",
    "images/s",
    "times as long as ours",
    "GFLOP/s",
    "first step, s",
    "peak GB, of it all",
    "peak GB, of steps",
    "first steps apart",
]


class Timing(NamedTuple):
    """A side's rounds.

    Attributes:
      seconds: of a step in each round.
      whole_peak, peak: the most bytes of memory that its process held, in its life and in rounds.
    """

    first: First
    seconds: list[float]
    whole_peak: int
    peak: int


class Pair(NamedTuple):
    """A twin and the package, which took turns; the twin has rounds only where both agree."""

    variant: str
    ours: Timing
    twin: Timing
    agreement: Agreement


def rows(pairs: list[Pair], batch: int) -> list[list[str]]:
    """Return a row for the package, then one for each twin."""
    timed = [pair.ours for pair in pairs if pair.agreement.holds]
    ours = (timed or [pairs[0].ours])[0]
    ours = ours._replace(
        seconds=[x for one in timed for x in one.seconds],
        peak=max((x.peak for x in timed), default=0),
    )
    flops = ours.first.flops
    found = [["r0_jax", *_cells(ours, batch, flops, "1" if ours.seconds else ""), ""]]
    for variant, here, there, agreement in pairs:
        ratios = [b / a for a, b in zip(here.seconds, there.seconds, strict=True)]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "none"
        apart = f"{agreement.apart[agreement.worst]:.0e}, {agreement.worst}"
        found.append(
            [
                f"PyTorch, {variant}",
                *_cells(there, batch, flops, ratio),
                apart if agreement.holds else f"**{apart}**",
            ]
        )
    return found


def _cells(timing: Timing, batch: int, flops: float, ratio: str) -> list[str]:
    first = [f"{timing.first.seconds:.1f}", f"{timing.whole_peak / 1e9:.2f}"]
    if not timing.seconds:
        return ["", "", ratio, "", *first, ""]
    seconds = statistics.median(timing.seconds)
    return [
        f"{seconds:.3f}",
        f"{batch / seconds:.1f}",
        ratio,
        f"{flops / seconds / 1e9:.1f}",
        *first,
        f"{timing.peak / 1e9:.2f}",
    ]


def heading(config: ConfigDict) -> str:
    """Return the heading of the section."""
    method = {"r0": "R0", "r0plus": "R0+"}[config.objective.method]
    return f"## The train step here and in PyTorch: shapes, {method}"


def text(
    pairs: list[Pair], broken: list[str], config: ConfigDict, recipe: str, rounds: int, steps: int
) -> str:
    """Return the section; `broken` are variants that ended with an error."""
    wrong = "".join(
        f"\n- PyTorch, {pair.variant}: {pair.agreement.worst} is "
        f"{pair.agreement.apart[pair.agreement.worst]:.1%} off, so it is not timed."
        for pair in pairs
        if not pair.agreement.holds
    ) + "".join(f"\n- PyTorch, {variant}: ended with an error." for variant in broken)
    flops = pairs[0].ours.first.flops / 1e9
    return f"""    python -m benchmarks.step {measure.given_flags()}

The whole train step of `{recipe}`: {config.batch_size} images, of prompts that are encoded before,
in {config.dtype}. PyTorch runs the networks of diffusers and transformers with the same weights,
prompts and rewards. In the first step the noise is the same too. A row has times only if that step
agrees: loss, scores, norms and the whole gradient, to {TOLERANCE:g} of their size. The last column
is the largest difference. The two sides take turns, each in a process of its own: {rounds} rounds
of {steps} steps, after one that is not timed. Seconds are medians of the rounds. "Times as long" is
the median over rounds that follow each other. A first step compiles. GFLOP/s are of {flops:.1f}
GFLOP a step, our count of the products. Memory is resident.

{measure.table(HEADER, rows(pairs, config.batch_size))}
{wrong}
{measure.machine("jax", "torch", "diffusers", "transformers")} Seed {config.seed}."""
