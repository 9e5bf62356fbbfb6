"""The plan of a machine that is there: its compiler says the memory, a few steps say the time."""

import os
import resource
import statistics
import time

import jax
import jax.numpy as jnp
from jax.stages import Traced
from ml_collections import ConfigDict

from r0_jax import config_check
from r0_jax.errors import InputError, of_config
from r0_jax.parallel import sharding
from r0_jax.plan import flops, memory, need, stages, weightless
from r0_jax.plan.need import Compiled
from r0_jax.plan.plan import Measured, Plan
from r0_jax.plan.stages import Planned
from r0_jax.training.program import Program
from r0_jax.weights import lazy


def measure(config: ConfigDict, name: str, steps: int, evaluation: bool = True) -> Plan:
    """Return the plan of a run on this machine's CPU ("cpu") or accelerator ("local").

    Run and time `steps` steps, after one that is not timed; with 0, only compile. The weights are
    those of the config. The prompts are made up: what a step costs does not depend on what it
    reads. The programs of evaluations are compiled, not run; without `evaluation` they are left
    out.
    """
    device = jax.devices()[0]
    if name == "local" and device.platform == "cpu":
        raise InputError("--topology=local: JAX finds no accelerator here; use --topology=cpu")
    with of_config():
        config_check.check_config(config)
        mesh = sharding.make_mesh(config.mesh.to_dict())
        sharding.microbatches(config.batch_size, config.device_batch, mesh)
        built = weightless.load(config, mesh)
    begin = time.perf_counter()
    step = stages.of_training_step(built)
    traced = step.stage.run.trace(*step.stage.arguments)
    counted = flops.of_step(built, traced)
    trace_seconds = time.perf_counter() - begin
    limit = (device.memory_stats() or {}).get("bytes_limit")
    limit = float(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size)
    first, program = _compile(step, traced, limit)
    needs = [first]
    for planned in stages.of_evaluations(built) if evaluation else ():
        traced = planned.stage.run.trace(*planned.stage.arguments)
        needs.append(_compile(planned, traced, limit)[0])
    compile_seconds = time.perf_counter() - begin - trace_seconds
    seconds, ran_out = None, program is None
    # Otherwise the system ends this process and others.
    if steps and program is not None and need.total(needs[:1], limit).memory.fits:
        try:
            seconds = _seconds_per_step(built, program, steps)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            ran_out = True
    total = need.total([first._replace(ran_out=ran_out), *needs[1:]], limit)
    return Plan(
        topology=name,
        chips=mesh.size,
        batch_size=config.batch_size,
        flops_per_step=counted.executed,
        model_flops_per_step=counted.model,
        memory=total.memory,
        programs=total.needs,
        evaluation=evaluation,
        bounds=None,
        measured=None if seconds is None else Measured(seconds, config.batch_size / seconds),
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        suggestions=total.suggestions,
    )


def _compile(
    planned: Planned, traced: Traced, limit: float
) -> tuple[Compiled, jax.stages.Compiled | None]:
    """Return what the compiler says of a program, and the program; None where it has no room."""
    begin = time.perf_counter()
    beside = memory.beside(traced.jaxpr.jaxpr, planned.stage.arguments, planned.stage.held)
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler knows what does not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program, own = None, memory.needed(str(error)) or limit
    else:
        found = program.memory_analysis()
        own = float(
            found.argument_size_in_bytes
            + found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
        )
    seconds = time.perf_counter() - begin
    return need.compiled(planned, own, 0.0, beside, program is None, seconds), program


def _seconds_per_step(built: Program, compiled: jax.stages.Compiled, steps: int) -> float:
    """Return the median of `steps` steps, each waited for."""
    frozen = lazy.place(built.frozen, built.frozen_sharding)
    state = jax.jit(built.init, out_shardings=built.state_sharding)(frozen["base"])
    batch = jax.tree.map(
        lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), built.abstract[2]
    )
    times = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
