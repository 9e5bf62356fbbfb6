"""The plan of a machine that is there: the step is run, not predicted."""

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
from r0_jax.plan import jaxpr_cost, predict
from r0_jax.plan.predict import Plan
from r0_jax.training.program import Program
from r0_jax.weights import lazy

_STEPS = 5  # that are timed, after one that is not


def measure(config: ConfigDict, name: str) -> Plan:
    """Runs the step on this machine's CPU ("cpu") or accelerator ("local"), on weights as they are
    in the config and on made-up prompts: what a step costs does not depend on what is in it."""
    device = jax.devices()[0]
    if name == "local" and device.platform == "cpu":
        raise InputError("--topology=local: JAX finds no accelerator here; use --topology=cpu")
    config_check.check_config(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.microbatches(config.batch_size, config.device_batch, mesh)
    built = predict.load(config, mesh)
    begin = time.perf_counter()
    traced = built.step.trace(*built.abstract)
    trips = predict.expected_trips(config)
    executed = jaxpr_cost.flops(traced.jaxpr.jaxpr, trips, predict.repeated(built))
    model = predict.model_flops(config, built, trips)
    middle = time.perf_counter()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    limit = float(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size)
    kinds, compiled = predict.bytes_by_kind(built), None
    try:
        compiled = traced.lower().compile()
        kinds["activations"] = float(compiled.memory_analysis().temp_size_in_bytes)
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler knows what does not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kinds["activations"] = (predict.needed(str(error)) or limit) - sum(kinds.values())
    end = time.perf_counter()
    peak = sum(kinds.values())
    seconds = None
    if compiled is not None and peak <= limit:  # or the system ends this process and others
        try:
            seconds = _seconds_per_step(built, compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    fits = seconds is not None
    return Plan(
        topology=name,
        chips=mesh.size,
        batch_size=config.batch_size,
        fits=fits,
        peak_bytes_per_chip=peak,
        hbm_bytes_per_chip=limit,
        bytes_per_chip=kinds,
        flops_per_step=executed,
        model_flops_per_step=model,
        bytes_accessed=None,
        collective_bytes=None,
        collective_bytes_by_kind=None,
        dcn_bytes=None,
        seconds=None,
        measured_seconds_per_step=seconds,
        bound_by=None,
        predicted_images_per_sec=config.batch_size / seconds if fits else None,
        predicted_mfu=None,
        trace_seconds=middle - begin,
        compile_seconds=end - middle,
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        suggestions=[] if fits else predict.suggest(config, built, kinds, peak - limit),
    )


def _seconds_per_step(built: Program, compiled: jax.stages.Compiled) -> float:
    frozen = lazy.place(built.frozen, built.frozen_sharding)
    state = jax.jit(built.init, out_shardings=built.state_sharding)(frozen["base"])
    batch = jax.tree.map(
        lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), built.abstract[2]
    )
    times = []
    for _ in range(1 + _STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
