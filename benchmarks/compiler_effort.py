"""Compares the bytes that `plan` counts with those of a run, which compiles with more effort.

    JAX_PLATFORMS=cpu python -m benchmarks.compiler_effort --out=docs/reports/scale.md

This compiles two parts of a training step and their gradients for one TPU chip. It uses the
effort of `plan` (--effort=-1) and of a run (0). Nothing runs; it needs requirements-tpu.txt.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import measure, tensor_parallel
from configs import sdxl_r0
from r0_jax import cli
from r0_jax.models import attention_backend
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.plan import hlo_cost, topology, weightless
from r0_jax.weights.network import Params

# A differentiated function, its weights, and its other arguments.
Part = tuple[Callable[..., jax.Array], Params, tuple[Any, ...]]


def decoder() -> Part:
    """Return SDXL's decoder for one image, with its gradient with respect to the latents."""
    with weightless.filled(sdxl_r0.get_config()) as config:
        pipeline = families.load(config.pretrained, config.dtype, config.family)
    side = flags.FLAGS.size // 8

    def loss(vae: Params, latents: jax.Array) -> jax.Array:
        return jnp.mean(pipeline.decode_unclipped(vae, latents) ** 2)

    return (
        jax.grad(loss, 1),
        pipeline.params["vae"],
        (jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32),),
    )


def transformer() -> Part:
    """Return blocks of Stable Diffusion 3's transformer for one 1024 px image, with gradients."""
    mesh = sharding.make_mesh({}, topology.find(flags.FLAGS.topology)[1])
    network, inputs = tensor_parallel.sd3(flags.FLAGS.blocks, mesh, 1)
    network = dataclasses.replace(network, attention=attention_backend.Backend("splash", mesh))

    def loss(params: Params, *inputs: jax.Array) -> jax.Array:
        return jnp.mean(jax.checkpoint(network)(params, *inputs).astype(jnp.float32) ** 2)

    bf16 = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in network.shapes.items()}
    return jax.grad(loss), bf16, tuple(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs)


def row(name: str, part: Part, effort: float) -> tuple[str, ...]:
    chip, devices = topology.find(flags.FLAGS.topology)
    where = sharding.replicated(sharding.make_mesh({}, devices))
    step, params, inputs = part
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        ({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in params.items()}, *inputs),
    )
    lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("tpu",))
    begin = time.perf_counter()
    compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": effort})
    seconds = time.perf_counter() - begin
    moved = hlo_cost.cost(compiled.as_text()).hbm_bytes
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return (
        name,
        f"{effort:g}",
        f"{moved / 1e9:.1f}",
        f"{1e3 * moved / chip.hbm_bandwidth:.1f}",
        f"{peak / 1e9:.2f}",
        f"{seconds:.0f}",
    )


def define_flags() -> None:
    cli.define_path("out", None, "Markdown file for the section; printed by default")
    flags.DEFINE_string("topology", "v5e-1", "a TPU with one chip")
    flags.DEFINE_integer("size", 512, "side of the decoder's image in pixels", lower_bound=64)
    flags.DEFINE_integer("blocks", 4, "blocks of Stable Diffusion 3's transformer", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    parts = {
        f"SDXL's decoder, {flags.FLAGS.size} px": decoder(),
        f"{flags.FLAGS.blocks} blocks of SD3's transformer": transformer(),
    }
    rows = [row(name, part, effort) for name, part in parts.items() for effort in (-1.0, 0.0)]
    text = measure.table(
        ("forward and gradient", "effort", "HBM, GB", "at least, ms", "peak, GB", "compiled, s"),
        rows,
    )
    measure.publish(
        flags.FLAGS.out,
        "## What the compiler's effort changes",
        f"{text}\n\n{flags.FLAGS.topology}. {measure.machine('jax', 'libtpu')}",
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
