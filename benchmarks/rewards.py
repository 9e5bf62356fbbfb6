"""Compares the reward towers of r0_jax and PyTorch: forward pass and image gradient.

    python -m benchmarks.rewards --dtype=bfloat16 --batch_size=32            # an accelerator
    python -m benchmarks.rewards --batch_size=2 --repeats=3                  # two CPU cores

Both use the same random weights, images and dtype, and the same device if torch supports it. The
table also shows how much their numbers differ. This needs JAX, PyTorch, transformers and rich, but
no packages for training.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags  # not r0_jax.cli: its config files need more packages

from benchmarks import measure, stacked_towers
from r0_jax.models import open_clip
from r0_jax.models.blip import ImageReward, ImageRewardConfig
from r0_jax.models.open_clip import VisionCfg
from r0_jax.weights import convert
from r0_jax.weights.network import Network

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import torch_twins

SIZE = 224
TOWERS = [*open_clip.ARCHITECTURES, "image_reward"]


def define_flags() -> None:
    flags.DEFINE_multi_enum(
        "tower",
        ["ViT-L-14", "ViT-H-14", "image_reward"],
        TOWERS,
        "HPS and PickScore are ViT-H-14; repeat the flag for several towers",
    )
    flags.DEFINE_integer("layers", 0, "number of layers to keep; 0: all", lower_bound=0)
    flags.DEFINE_integer("batch_size", 8, "images at once", lower_bound=1)
    flags.DEFINE_integer("repeats", 9, "timed calls after one warm-up call", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "dtype of weights and activations"
    )
    flags.DEFINE_bool("torch_compile", False, "use torch.compile; else PyTorch is eager")
    flags.DEFINE_string("out", None, "document for the section; printed by default")


class Pair(NamedTuple):
    """One tower in both libraries, with the same weights.

    Attributes:
      network: the tower of r0_jax.
      module: the tower in PyTorch, with frozen weights.
      inputs: NumPy inputs of the tower besides images (token ids).
    """

    network: Network
    module: torch.nn.Module
    inputs: tuple[np.ndarray, ...]


def build(tower: str, layers: int, batch_size: int) -> Pair:
    """Build both networks; PyTorch's has random weights of the scale of trained ones."""
    if tower == "image_reward":
        vision = {
            "image_size": SIZE,
            "patch_size": 16,
            "width": 1024,
            "layers": layers or 24,
            "heads": 16,
        }
        text = {
            "vocab_size": 30524,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "num_hidden_layers": min(layers or 12, 12),
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
        }
        module = torch_twins.ImageReward(vision, text)
        config = ImageRewardConfig.from_json({"vision_config": vision, "text_config": text})
        network = Network.abstract(lambda rngs: ImageReward(config, rngs=rngs))
        inputs = (np.ones((batch_size, 35), np.int32),)
    else:
        network, inputs = stacked_towers.build(tower, layers), ()
        config = network.config
        cfg: VisionCfg = config.vision_cfg
        module = torch_twins.Vision(
            cfg.width,
            cfg.layers,
            cfg.heads,
            cfg.patch_size,
            cfg.image_size,
            config.embed_dim,
            config.activation,
            cfg.mlp_ratio,
        )
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        value.requires_grad_(False)  # only the image needs a gradient
        value.copy_(torch.randn(value.shape, generator=generator).mul_(0.02))
        if "norm" in name.lower() or ".ln_" in f".{name}":
            value.add_(name.endswith("weight"))
    return Pair(network, module.eval(), inputs)


class Timing(NamedTuple):
    """The cost of a call and its result.

    The fields are milliseconds per call, seconds to compile, MiB beyond weights and images (None:
    unknown), and the computed array.
    """

    milliseconds: float
    compile_time: float
    memory: float | None
    value: np.ndarray


def ours(pair: Pair, images: np.ndarray) -> list[Timing]:
    """Time r0_jax's forward pass and image gradient."""
    given = flags.FLAGS
    state = pair.module.state_dict()
    params = {
        name: jnp.asarray(
            convert.from_checkpoint(name, state[convert.to_key(name)].numpy()), given.dtype
        )
        for name in pair.network.shapes
    }

    def forward(params, images):
        return (
            pair.network(params, *pair.inputs, images)
            .astype(jnp.float32)
            .reshape(len(images), -1)
            .mean(axis=-1)
        )

    def gradient(params, images):
        return jax.grad(lambda x: forward(params, x).sum())(images)

    found, there = [], jnp.asarray(images, given.dtype)
    for function in (forward, gradient):
        begin = time.perf_counter()
        compiled = jax.jit(function).lower(params, there).compile()
        compile_time = time.perf_counter() - begin
        call = functools.partial(compiled, params, there)
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        found.append(
            Timing(
                measure.milliseconds(call, given.repeats),
                compile_time,
                memory,
                np.asarray(call(), np.float32),
            )
        )
    return found


def theirs(pair: Pair, images: np.ndarray) -> list[Timing]:
    """Time PyTorch's forward pass and image gradient, on a GPU if JAX uses one."""
    given = flags.FLAGS
    cuda = torch.cuda.is_available() and jax.default_backend() == "gpu"
    dtype, device = getattr(torch, given.dtype), "cuda" if cuda else "cpu"
    module = pair.module.to(device=device, dtype=dtype)
    inputs = [torch.tensor(x, device=device) for x in pair.inputs]
    there = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(device=device, dtype=dtype)
    run = torch.compile(module) if given.torch_compile else module

    def mean(images):
        return run(*inputs, images).float().reshape(len(images), -1).mean(dim=-1)

    def forward():
        with torch.no_grad():
            return mean(there)

    def gradient():
        leaf = there.clone().requires_grad_()
        mean(leaf).sum().backward()
        return leaf.grad.permute(0, 2, 3, 1)

    def waited(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        value = call()
        if cuda:
            torch.cuda.synchronize()
        return value

    found = []
    for function in (forward, gradient):
        call, memory = functools.partial(waited, function), None
        begin = time.perf_counter()
        value = call().float().cpu().numpy()
        first = time.perf_counter() - begin
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        took = measure.milliseconds(call, given.repeats)
        if cuda:
            memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        found.append(Timing(took, max(0.0, first - took / 1e3), memory, value))
    return found


def rows(tower: str) -> list[list[str]]:
    """Return one row for the forward pass and one for the image gradient."""
    given = flags.FLAGS
    images = (
        np.random.default_rng(0)
        .standard_normal((given.batch_size, SIZE, SIZE, 3))
        .astype(np.float32)
    )
    pair, found = build(tower, given.layers, given.batch_size), []
    both = zip(("forward", "image gradient"), ours(pair, images), theirs(pair, images), strict=True)
    for name, here, there in both:
        apart = np.abs(here.value - there.value).max() / np.abs(there.value).max()
        memory = ["" if x.memory is None else f"{x.memory:.0f}" for x in (here, there)]
        found.append(
            [
                f"{tower}, {name}",
                f"{here.milliseconds:.1f}",
                f"{there.milliseconds:.1f}",
                f"{there.milliseconds / here.milliseconds:.2f}",
                f"{apart:.0e}",
                f"{here.compile_time:.1f}",
                f"{there.compile_time:.1f}",
                *memory,
            ]
        )
    return found


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    jax.config.update(
        "jax_default_matmul_precision", "highest" if given.dtype == "float32" else "default"
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = [row for tower in given.tower for row in rows(tower)]
    header = [
        "tower",
        "r0_jax ms",
        "PyTorch ms",
        "PyTorch / r0_jax",
        "apart",
        "r0_jax compile s",
        "PyTorch compile s",
        "r0_jax MiB",
        "PyTorch MiB",
    ]
    text = f"""    python -m benchmarks.rewards {measure.given_flags()}

{given.batch_size} images of {SIZE} px, {given.layers or "all"} layers, {given.dtype}, PyTorch
{"compiled" if given.torch_compile else "eager"}. "apart" is the largest difference as a share of
the largest element; memory is beyond weights and images{
        "" if any(row[-1] for row in found) else " (PyTorch does not tell on a CPU)"
    }.

{measure.table(header, found)}

{measure.machine("jax", "torch")} Seed 0, median of {given.repeats} calls."""
    heading = f"## Towers here and in PyTorch: {jax.devices()[0].device_kind}, {given.dtype}"
    measure.publish(given.out, heading, text)


if __name__ == "__main__":
    define_flags()
    app.run(main)
