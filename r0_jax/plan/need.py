"""What the programs of a run need on a chip, put together once all of them are compiled."""

from collections.abc import Sequence
from typing import NamedTuple

from r0_jax.console import console
from r0_jax.plan import memory
from r0_jax.plan.plan import Memory, Need
from r0_jax.plan.stages import Planned


class Compiled(NamedTuple):
    """What the compiler said of one program.

    Attributes:
      own_bytes: of one chip: what the program reads and writes, without its code.
      code_bytes: of one chip.
      beside_bytes: what lies there too (memory.py).
      ran_out: whether it found no room; `own_bytes` is then what it would need.
      seconds: that it took.
    """

    planned: Planned
    own_bytes: float
    code_bytes: float
    beside_bytes: float
    ran_out: bool
    seconds: float


def compiled(
    planned: Planned, own: float, code: float, beside: float, ran_out: bool, seconds: float
) -> Compiled:
    """Return what the compiler said, after a line that says so to those who wait."""
    name, size = planned.stage.name, (own + code + beside) / 2**30
    console.print(f"{name}: {size:.2f} GiB, compiled in {seconds:.0f} s", highlight=False)
    return Compiled(planned, own, code, beside, ran_out, seconds)


class Total(NamedTuple):
    """What is reported of all programs together."""

    memory: Memory
    needs: list[Need]
    suggestions: list[str]


def total(programs: Sequence[Compiled], limit: float) -> Total:
    """Return what a chip of `limit` bytes has to hold for all programs, one after the other."""
    needs: list[Need] = []
    kinds: dict[str, dict[str, float]] = {}
    suggestions: dict[str, None] = {}  # in their order, each once
    for program in programs:
        stage, suggest, phase = program.planned
        code = sum(other.code_bytes for other in programs if other.planned.loaded_with == phase)
        peak = program.own_bytes + program.beside_bytes + code
        found = memory.bytes_by_kind(stage.held) | ({"code": code} if code else {})
        found["activations"] = peak - sum(found.values())
        fits = not program.ran_out and peak <= limit
        if not fits:
            suggestions |= dict.fromkeys(suggest(found, peak - limit))
        kinds[stage.name] = found
        needs.append(Need(stage.name, fits, peak, found["activations"], program.seconds))
    largest = max(needs, key=lambda need: need.peak_bytes)
    fits = all(need.fits for need in needs)
    held = Memory(fits, largest.program, largest.peak_bytes, limit, kinds[largest.program])
    return Total(held, needs, list(suggestions))
