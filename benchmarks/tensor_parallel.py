"""Measures the effect of a tensor axis on the memory and traffic of a device.

It compiles blocks of T5-XXL and of Stable Diffusion 3's transformer at their published width, and
runs nothing.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
      python -m benchmarks.tensor_parallel

XLA gives the figures for one of eight devices in float32; bfloat16 halves them. Weights and traffic
are those of one block: the difference between three blocks and two. The encoder is frozen and
computes a forward pass. The transformer is trained: forward, gradient and rematerialization.
"""

import argparse
import collections
import re
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r0_jax import config as base
from r0_jax.models.t5 import T5Config, T5EncoderModel
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig, SD3Transformer2DModel
from r0_jax.parallel import sharding
from r0_jax.weights.network import Network

XXL = {
    "vocab_size": 128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
SD3 = {
    "sample_size": 128,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
MESHES = [(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 8, 1), (1, 4, 2), (1, 2, 4)]
TOKENS = 333  # per prompt: 77 of CLIP and 256 of T5

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\(.*?replica_groups=(\S+)"
)
_SHAPE = re.compile(r"f32\[([\d,]*)\]")


class Cost(NamedTuple):
    """Bytes of one device: its weights, its working memory, and its traffic by kind."""

    weights: int
    temporary: int
    sent: dict[str, int]


def t5(blocks: int, mesh: Mesh, batch: int) -> tuple[Callable, tuple, Any]:
    network = Network.abstract(
        lambda rngs: T5EncoderModel(T5Config(num_layers=blocks, **XXL), rngs=rngs)
    )
    ids = jax.ShapeDtypeStruct((batch, 256), jnp.int32, sharding=sharding.batch_sharding(mesh))
    return network, (ids,)


def sd3(blocks: int, mesh: Mesh, batch: int):
    network = Network.abstract(
        lambda rngs: SD3Transformer2DModel(
            SD3Transformer2DConfig(num_layers=blocks, **SD3), rngs=rngs
        )
    )
    shapes = [(128, 128, 16), (), (TOKENS, 4096), (2048,)]
    return network, tuple(
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=sharding.batch_sharding(mesh))
        for shape in shapes
    )


def cost(build, blocks: int, sizes: tuple[int, ...], batch: int, trained: bool) -> Cost:
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    network, inputs = build(blocks, mesh, batch)
    where = sharding.param_sharding(network.shapes, mesh, base.get_config().sharding, network.heads)
    params = sharding.with_sharding(network.shapes, where)

    def loss(params, *inputs):
        return jnp.mean(jax.checkpoint(network)(params, *inputs) ** 2)

    step = (
        jax.jit(jax.grad(loss), out_shardings=where)
        if trained
        else jax.jit(network, out_shardings=sharding.batch_sharding(mesh))
    )
    compiled = step.lower(params, *inputs).compile()
    memory = compiled.memory_analysis()
    held = sum(prod(where[name].shard_shape(x.shape)) * 4 for name, x in params.items())
    return Cost(held, memory.temp_size_in_bytes, _sent(compiled.as_text()))


def _sent(program: str) -> dict[str, int]:
    """Return the bytes that a device sends in ring collectives, by kind."""
    sent: dict[str, int] = collections.Counter()
    for shapes, kind, groups in _COLLECTIVE.findall(program):
        size = 4 * sum(
            prod(map(int, filter(None, shape.split(",")))) for shape in _SHAPE.findall(shapes)
        )
        members = _members(groups)
        share = (members - 1) / members
        # The size of the output: all of a gather, but one member's part of a reduce-scatter.
        sent[kind] += int(
            size
            * {"all-reduce": 2 * share, "reduce-scatter": members - 1, "collective-permute": 1}.get(
                kind, share
            )
        )
    return sent


def _members(groups: str) -> int:
    """Return the devices per group of {{0,1},{2,3}} or [2,4]<=[8]."""
    if groups.startswith("["):
        return int(groups.split("]")[0].split(",")[1])
    return len(groups.split("}")[0].split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="samples over all eight devices")
    batch = parser.parse_args().batch
    print(
        "| network | data | fsdp | tensor | weights a block, MB | working memory, GB "
        "| sent a block, MB |\n|---|---:|---:|---:|---:|---:|---|"
    )
    for name, build, trained in (("T5-XXL, frozen", t5, False), ("SD3, trained", sd3, True)):
        for sizes in MESHES:
            if batch % (sizes[0] * sizes[1]):
                continue  # a device or group needs a sample
            two, three = (cost(build, blocks, sizes, batch, trained) for blocks in (2, 3))
            sent = {kind: three.sent[kind] - two.sent[kind] for kind in three.sent}
            kinds = ", ".join(
                f"{kind} {size / 1e6:.0f}" for kind, size in sent.items() if size > 5e5
            )
            print(
                f"| {name} | {' | '.join(map(str, sizes))} "
                f"| {(three.weights - two.weights) / 1e6:.0f} | {three.temporary / 1e9:.2f} "
                f"| {sum(sent.values()) / 1e6:.0f}{f' ({kinds})' if kinds else ''} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
