"""The plan of a slice that is not there: the step is compiled for it, not run.

FLOPs are counted in the jaxpr, bytes in the optimized HLO: the compiler's own counts take the body
of a loop once. docs/scale.md says how every figure comes about.
"""

import resource
import time
from typing import Any

import jax
from jax.stages import Lowered
from ml_collections import ConfigDict

from r0_jax import config_check
from r0_jax.parallel import sharding
from r0_jax.plan import flops, hlo_cost, memory, weightless
from r0_jax.plan.flops import Flops
from r0_jax.plan.hlo_cost import Cost
from r0_jax.plan.plan import Bounds, Memory, Plan
from r0_jax.plan.suggestions import suggest
from r0_jax.plan.topology import Chip


def predict(config: ConfigDict, name: str, chip: Chip, devices: list[Any], effort: float) -> Plan:
    """Compile the step of a config for the devices of a slice, and return what was found."""
    config_check.check_config(config, devices[0])
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    sharding.microbatches(config.batch_size, config.device_batch, mesh)
    built = weightless.load(config, mesh)
    begin = time.perf_counter()
    traced = built.step.trace(*built.abstract)
    counted = flops.of_step(built, traced)
    lowered = traced.lower(lowering_platforms=("tpu",))
    middle = time.perf_counter()
    lying = memory.bytes_by_kind(built)
    beside = memory.unused_bytes(traced.jaxpr.jaxpr, built)
    held, costs = _compile(lowered, effort, flops.expected_trips(config), chip, lying, beside)
    end = time.perf_counter()
    over = held.peak_bytes - held.limit_bytes
    return Plan(
        topology=name,
        chips=mesh.size,
        batch_size=config.batch_size,
        flops_per_step=counted.executed,
        model_flops_per_step=counted.model,
        memory=held,
        bounds=costs and _bounds(costs, counted, chip, mesh.size, config.batch_size),
        measured=None,
        trace_seconds=middle - begin,
        compile_seconds=end - middle,
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        suggestions=[] if held.fits else suggest(config, built, held.by_kind, over),
    )


def _compile(
    lowered: Lowered,
    effort: float,
    trips: float,
    chip: Chip,
    lying: dict[str, float],
    beside: float,
) -> tuple[Memory, Cost | None]:
    """Return what a chip holds, and what the program moves; None where it has no room.

    `lying` are bytes that lie there from step to step; `beside`, those of them that the compiler
    does not know of.
    """
    kinds = dict(lying)
    try:
        compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": effort})
    except jax.errors.JaxRuntimeError as error:
        if (said := memory.needed(str(error))) is None:
            raise
        costs, peak = None, said + beside
    else:
        found = compiled.memory_analysis()
        # Not temp_size_in_bytes, which counts what never lives at once.
        peak = float(found.peak_memory_in_bytes + found.generated_code_size_in_bytes) + beside
        kinds["code"] = float(found.generated_code_size_in_bytes)
        costs = hlo_cost.cost(compiled.as_text(), trips)
    kinds["activations"] = peak - sum(kinds.values())
    fits = costs is not None and peak <= chip.hbm_bytes
    return Memory(fits, peak, chip.hbm_bytes, kinds), costs


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
