"""Say whether a config fits a TPU slice and what bounds it there, without slice or weights:

    python -m r0_jax.plan --config=configs/sdxl_r0.py --topology=v5e-16 [--json] [--noevaluation]

compiles the real programs of a run with the real TPU compiler (requirements-tpu.txt) on a machine
that has no TPU. They are the training step, those of the evaluations, and those of the table at the
end if the config has test.prompts. `--noevaluation` compiles the step alone, which is quicker.
`--topology=cpu` and `--topology=local` run the step on this machine instead, and measure; with
`--steps=0` they only compile.

`--json` prints one object (plan.py says what each number is):

    topology, chips, batch_size
    flops_per_step, model_flops_per_step
    memory      {fits, program, peak_bytes, limit_bytes, by_kind: {kind: bytes}}, of one chip, for
                the program that needs most; `fits` speaks of all
    programs    [{program, fits, peak_bytes, working_bytes, compile_seconds}], the step first
    evaluation  whether more than the step was planned
    bounds      {hbm_bytes, sent_bytes: {kind: bytes}, dcn_bytes, seconds: {kind: seconds},
                bound_by, images_per_sec, mfu}, of a slice; otherwise null
    measured    {seconds_per_step, images_per_sec}, of this machine; null of a slice and of 0 steps
    trace_seconds, compile_seconds, host_bytes
    suggestions
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import dataclasses
import json

import jax
import rich.console
import rich.table
from absl import flags

from r0_jax import cli
from r0_jax.plan import measure, predict, topology, weightless
from r0_jax.plan.plan import Plan

_GIB = 2**30


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_config()
    flags.DEFINE_string(
        "topology",
        None,
        "a TPU slice such as v5e-16, v5p-8 (8 cores), "
        "v6e-8 or 2xv5e-16; or cpu, or local: this machine's accelerator",
        required=True,
    )
    flags.DEFINE_bool("json", False, "one JSON object on standard output")
    flags.DEFINE_bool(
        "evaluation",
        True,
        "also compile what evaluations and the table run; without it, the training step alone",
    )
    flags.DEFINE_integer(
        "steps", 5, "timed steps on this machine; 0 only compiles: memory alone", lower_bound=0
    )
    flags.DEFINE_float(
        "effort",
        -1.0,
        "how hard the compiler tries, from -1 (quick; more goes through memory "
        "than in a run, see docs/scale.md) to 0 (as in a run; takes many times longer)",
        lower_bound=-1.0,
        upper_bound=0.0,
    )


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    config, name = given.config, given.topology
    jax.config.update("jax_platforms", "cpu" if name != "local" else None)
    here = name in ("cpu", "local")
    chip, devices = (None, []) if here else topology.find(name)
    with weightless.filled(config) as config:
        found = (
            measure.measure(config, name, given.steps, given.evaluation)
            if here
            else predict.predict(config, name, chip, devices, given.effort, given.evaluation)
        )
    if given.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print_plan(found)


def print_plan(found: Plan) -> None:
    """Print a plan for people, on standard output."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    table = rich.table.Table(
        title=f"{found.topology}: {found.chips} devices, {found.batch_size} images a step"
    )
    memory = found.memory
    table.add_column(f"of a chip, in the {memory.program}")
    table.add_column("GiB", justify="right")
    for kind, size in memory.by_kind.items():
        table.add_row(kind, f"{size / _GIB:.2f}")
    table.add_section()
    table.add_row("peak", f"{memory.peak_bytes / _GIB:.2f}")
    table.add_row("memory of a chip", f"{memory.limit_bytes / _GIB:.2f}")
    console.print(table)
    if found.evaluation:
        console.print(_programs(found))
    console.print("fits" if memory.fits else "does NOT fit")
    if not found.evaluation:
        console.print("only the training step was planned: an evaluation may need more memory")
    for line in found.suggestions:
        console.print(f"  try {line}")
    console.print(
        f"{found.flops_per_step / 1e12:,.1f} TFLOP a step, of them "
        f"{found.model_flops_per_step / 1e12:,.1f} without what is computed twice"
    )
    if bounds := found.bounds:
        sent = sum(bounds.sent_bytes.values())
        dcn = f", and {bounds.dcn_bytes / 1e9:,.2f} GB to other slices" if bounds.dcn_bytes else ""
        console.print(
            f"{bounds.hbm_bytes / 1e9:,.1f} GB through a chip's memory, "
            f"{sent / 1e9:,.2f} GB sent by a chip{dcn}"
        )
        least = ", ".join(f"{kind} {1e3 * value:,.0f} ms" for kind, value in bounds.seconds.items())
        console.print(f"a step takes at least: {least}; bound by {bounds.bound_by}")
        console.print(f"by that {bounds.images_per_sec:,.1f} images/s, MFU {bounds.mfu:.0%}")
    elif measured := found.measured:
        console.print(
            f"measured: {measured.seconds_per_step:.3g} s a step, "
            f"{measured.images_per_sec:,.2f} images/s"
        )
    console.print(
        f"traced in {found.trace_seconds:.0f} s, compiled in {found.compile_seconds:.0f} "
        f"s, {found.host_bytes / 1e9:.1f} GB of host memory"
    )


def _programs(found: Plan) -> rich.table.Table:
    table = rich.table.Table()
    table.add_column("program")
    table.add_column("peak, GiB", justify="right")
    table.add_column("of it its own, GiB", justify="right")
    table.add_column("fits")
    table.add_column("compiled, s", justify="right")
    for need in found.programs:
        table.add_row(
            need.program,
            f"{need.peak_bytes / _GIB:.2f}",
            f"{need.working_bytes / _GIB:.2f}",
            "yes" if need.fits else "NO",
            f"{need.compile_seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    define_flags()
    cli.run(main)
