"""The plan of a run, in the form that `--json` prints."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Memory:
    """Say what one chip holds.

    Attributes:
      fits: whether every program of `Plan.programs` has room; on this machine, also whether the
        step ran.
      program: the one that needs most.
      peak_bytes: what a chip holds at the worst moment of that program.
      limit_bytes: what it can hold.
      by_kind: bytes of the peak: parameters, ema, optimizer, each frozen network, what else lies
        there, code (predicted only), and activations, which are the rest.
    """

    fits: bool
    program: str
    peak_bytes: float
    limit_bytes: float
    by_kind: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Need:
    """Say what one program needs on one chip.

    Attributes:
      program: "training step", "term norms", "drawing", "reward NAME", "table: drawing", ...
      peak_bytes: what a chip holds at its worst moment, with all that lies there and is not read.
      working_bytes: the part of it that the program itself allocates.
    """

    program: str
    fits: bool
    peak_bytes: float
    working_bytes: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Say what bounds a step that the TPU's compiler has compiled.

    Attributes:
      hbm_bytes: of one chip, read and written in its memory.
      sent_bytes: of one chip, sent to other chips of its slice, by kind of collective.
      dcn_bytes: of one chip, sent to other slices.
      seconds: the least that a step takes by "compute", "hbm", "interconnect" and, with several
        slices, "dcn" alone.
      bound_by: the one of them that takes longest.
      images_per_sec, mfu: what follows from that one.
    """

    hbm_bytes: float
    sent_bytes: dict[str, float]
    dcn_bytes: float
    seconds: dict[str, float]
    bound_by: str
    images_per_sec: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """Say what a step took on this machine; `seconds_per_step` is a median."""

    seconds_per_step: float
    images_per_sec: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a config needs on a slice or on this machine.

    Attributes:
      batch_size: images a step, over all chips.
      flops_per_step, model_flops_per_step: over all chips, with and without what is computed
        twice.
      memory: of the program that needs most.
      programs: all that were planned, in the order in which they were compiled.
      evaluation: whether those of evaluations and of the table are among them. Otherwise `fits`
        speaks of the training step alone.
      bounds: of the step; None on this machine, and where the step does not compile.
      measured: of the step; None for a slice, and where the step does not run.
      trace_seconds, compile_seconds, host_bytes: what planning cost on this machine.
      suggestions: what would make it fit, the cheapest first.
    """

    topology: str
    chips: int
    batch_size: int
    flops_per_step: float
    model_flops_per_step: float
    memory: Memory
    programs: list[Need]
    evaluation: bool
    bounds: Bounds | None
    measured: Measured | None
    trace_seconds: float
    compile_seconds: float
    host_bytes: float
    suggestions: list[str]
