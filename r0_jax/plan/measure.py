"""The plan of a machine that is there: its compiler says the memory, a few steps say the time."""

import os
import resource
import statistics
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from r0_jax import config_check
from r0_jax.errors import InputError
from r0_jax.parallel import sharding
from r0_jax.plan import flops, memory, weightless
from r0_jax.plan.plan import Measured, Memory, Plan
from r0_jax.plan.suggestions import suggest
from r0_jax.training.program import Program
from r0_jax.weights import lazy


def measure(config: ConfigDict, name: str, steps: int) -> Plan:
    """Return the plan of a step on this machine's CPU ("cpu") or accelerator ("local").

    Run and time `steps` steps, after one that is not timed; with 0, only compile. The weights are
    those of the config. The prompts are made up: what a step costs does not depend on what it
    reads.
    """
    device = jax.devices()[0]
    if name == "local" and device.platform == "cpu":
        raise InputError("--topology=local: JAX finds no accelerator here; use --topology=cpu")
    config_check.check_config(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.microbatches(config.batch_size, config.device_batch, mesh)
    built = weightless.load(config, mesh)
    begin = time.perf_counter()
    traced = built.step.trace(*built.abstract)
    counted = flops.of_step(built, traced)
    middle = time.perf_counter()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    limit = float(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size)
    kinds, compiled = memory.bytes_by_kind(built), None
    try:
        compiled = traced.lower().compile()
        kinds["activations"] = float(compiled.memory_analysis().temp_size_in_bytes)
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler knows what does not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kinds["activations"] = (memory.needed(str(error)) or limit) - sum(kinds.values())
    end = time.perf_counter()
    peak = sum(kinds.values())
    seconds, fits = None, compiled is not None and peak <= limit
    if fits and steps:  # otherwise the system would end this process and others
        try:
            seconds = _seconds_per_step(built, compiled, steps)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fits = False
    return Plan(
        topology=name,
        chips=mesh.size,
        batch_size=config.batch_size,
        flops_per_step=counted.executed,
        model_flops_per_step=counted.model,
        memory=Memory(fits, peak, limit, kinds),
        bounds=None,
        measured=None if seconds is None else Measured(seconds, config.batch_size / seconds),
        trace_seconds=middle - begin,
        compile_seconds=end - middle,
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        suggestions=[] if fits else suggest(config, built, kinds, peak - limit),
    )


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
