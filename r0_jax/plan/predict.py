"""The plan of a slice that is not there: programs are compiled for it, not run.

FLOPs are counted in the jaxpr, bytes in the optimized HLO: the compiler's own counts take the body
of a loop once. docs/scale.md says how every figure comes about.
"""

import resource
import time
from typing import Any

import jax
from jax.stages import Traced
from ml_collections import ConfigDict

from r0_jax import config_check
from r0_jax.errors import of_config
from r0_jax.parallel import sharding
from r0_jax.plan import flops, hlo_cost, memory, need, stages, weightless
from r0_jax.plan.flops import Flops
from r0_jax.plan.hlo_cost import Cost
from r0_jax.plan.need import Compiled
from r0_jax.plan.plan import Bounds, Plan
from r0_jax.plan.stages import Planned
from r0_jax.plan.topology import Chip


def predict(
    config: ConfigDict,
    name: str,
    chip: Chip,
    devices: list[Any],
    effort: float,
    evaluation: bool = True,
) -> Plan:
    """Compile a config's programs for the devices of a slice, and return what was found.

    Without `evaluation` the training step alone.
    """
    with of_config():
        config_check.check_config(config, devices[0])
        mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
        sharding.microbatches(config.batch_size, config.device_batch, mesh)
        built = weightless.load(config, mesh)
    begin = time.perf_counter()
    step = stages.of_training_step(built)
    traced = step.stage.run.trace(*step.stage.arguments)
    counted = flops.of_step(built, traced)
    trace_seconds = time.perf_counter() - begin
    first, program = _compile(step, traced, effort)
    costs = program and hlo_cost.cost(program.as_text(), flops.expected_trips(config))
    del program  # the host's memory is needed for the next one
    needs = [first]
    for planned in stages.of_evaluations(built) if evaluation else ():
        traced = planned.stage.run.trace(*planned.stage.arguments)
        needs.append(_compile(planned, traced, effort)[0])
    total = need.total(needs, chip.hbm_bytes)
    return Plan(
        topology=name,
        chips=mesh.size,
        batch_size=config.batch_size,
        flops_per_step=counted.executed,
        model_flops_per_step=counted.model,
        memory=total.memory,
        programs=total.needs,
        evaluation=evaluation,
        bounds=costs and _bounds(costs, counted, chip, mesh.size, config.batch_size),
        measured=None,
        trace_seconds=trace_seconds,
        compile_seconds=time.perf_counter() - begin - trace_seconds,
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        suggestions=total.suggestions,
    )


def _compile(
    planned: Planned, traced: Traced, effort: float
) -> tuple[Compiled, jax.stages.Compiled | None]:
    """Return what the compiler says of a program, and the program; None where it has no room."""
    begin = time.perf_counter()
    beside = memory.beside(traced.jaxpr.jaxpr, planned.stage.arguments, planned.stage.held)
    lowered = traced.lower(lowering_platforms=("tpu",))
    try:
        program = lowered.compile(compiler_options={"exec_time_optimization_effort": effort})
    except jax.errors.JaxRuntimeError as error:
        if (said := memory.needed(str(error))) is None:
            raise
        program, own, code = None, said, 0.0
    else:
        found = program.memory_analysis()
        # Not temp_size_in_bytes, which counts what never lives at once.
        own = float(found.peak_memory_in_bytes)
        code = float(found.generated_code_size_in_bytes)
    seconds = time.perf_counter() - begin
    return need.compiled(planned, own, code, beside, program is None, seconds), program


def _bounds(costs: Cost, counted: Flops, chip: Chip, chips: int, batch_size: int) -> Bounds:
    seconds = {
        "compute": counted.executed / chips / chip.flops,
        "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(costs.collective_bytes.values()) / chip.ici_bandwidth,
    }
    if costs.dcn_bytes and chip.dcn_bandwidth:
        seconds["dcn"] = costs.dcn_bytes / chip.dcn_bandwidth
    longest = max(seconds.values())
    return Bounds(
        hbm_bytes=costs.hbm_bytes,
        sent_bytes=costs.collective_bytes,
        dcn_bytes=costs.dcn_bytes,
        seconds=seconds,
        bound_by=max(seconds, key=seconds.get),
        images_per_sec=batch_size / longest,
        mfu=counted.model / longest / chips / chip.flops,
    )
