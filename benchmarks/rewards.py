"""The reward towers here and in PyTorch, side by side in one run: forward, and image gradient.

    python -m benchmarks.rewards --tower=ViT-H-14 --batch_size=8
    python -m benchmarks.rewards --tower=image_reward --layers=2

The second cuts the tower short, for small machines. Both sides compute the same random weights on
the same images, on the same device where torch has it; the table also says how far their numbers
are apart. Needs the packages of requirements-dev.txt.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from rich.console import Console
from rich.table import Table

from r0_jax import cli, convert
from r0_jax.convert_reward import REWARDS
from r0_jax.models import open_clip

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torch_twins

SIZE = 224
TOWERS = [*open_clip.ARCHITECTURES, "image_reward"]


def define_flags() -> None:
    flags.DEFINE_enum("tower", "ViT-H-14", TOWERS, "HPS and PickScore are ViT-H-14")
    flags.DEFINE_integer("layers", 0, "keep so many layers; 0: all", lower_bound=0)
    flags.DEFINE_integer("batch_size", 8, "images at once", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "timed calls, after one that warms up", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations")


def build(tower: str, layers: int, dtype: str):
    """(our function of params and images, params, torch module's function of images)."""
    if tower == "image_reward":
        depth = layers or 24
        vision = {"image_size": SIZE, "patch_size": 16, "width": 1024, "layers": depth,
                  "heads": 16}
        text = {"vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": min(depth, 12),
                "num_attention_heads": 12, "intermediate_size": 3072,
                "max_position_embeddings": 512}
        module = torch_twins.ImageReward(vision, text)
        network = REWARDS["image_reward"][0].network({"vision_config": vision,
                                                      "text_config": text})
        ids = np.ones((flags.FLAGS.batch_size, 35), np.int32)

        def ours(params, images):
            return network(params, ids, images)

        def theirs(images):
            return module(torch.tensor(ids, device=images.device), images)
    else:
        fields = open_clip.ARCHITECTURES[tower]
        if layers:
            fields = fields | {part: fields[part] | {"layers": layers}
                               for part in ("vision_cfg", "text_cfg")}
        module = torch_twins.OpenCLIP(fields)
        network = REWARDS["clip_score"][0].network(fields)

        def ours(params, images):
            return network.apply(params, "image_features", images).mean(axis=-1)

        def theirs(images):
            return module.image_features(images).mean(dim=-1)

    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        value.requires_grad_(False)  # only the image's gradient is asked for
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
        elif name.endswith("embedding"):
            value.copy_(torch.randn(value.shape, generator=generator))
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    params = {name: jnp.asarray(convert.from_checkpoint(name, state[convert.to_key(name)]), dtype)
              for name in network.shapes}
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    module.eval().to(device=device, dtype=getattr(torch, dtype))
    return ours, params, theirs, device


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    ours, params, theirs, device = build(given.tower, given.layers, given.dtype)
    images = np.random.default_rng(0).standard_normal(
        (given.batch_size, SIZE, SIZE, 3)).astype(np.float32)
    here = jnp.asarray(images, given.dtype)
    there = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(
        device=device, dtype=getattr(torch, given.dtype))

    forward = jax.jit(ours)
    gradient = jax.jit(jax.grad(lambda x, params: ours(params, x).astype(jnp.float32).sum()))

    def torch_forward() -> torch.Tensor:
        with torch.no_grad():
            return theirs(there).cpu()  # waits for the device

    def torch_gradient() -> torch.Tensor:
        leaf = there.clone().requires_grad_()
        theirs(leaf).sum().backward()
        return leaf.grad.cpu()

    table = Table("", "r0_jax", "PyTorch", "difference", title=(
        f"{given.tower}, {given.layers or 'all'} layers, batch {given.batch_size}, "
        f"{given.dtype}, {jax.devices()[0].device_kind}: milliseconds"))
    for name, our_call, torch_call, layout in (
            ("forward", lambda: forward(params, here).block_until_ready(), torch_forward, None),
            ("image gradient", lambda: gradient(here, params).block_until_ready(), torch_gradient,
             (0, 2, 3, 1))):
        found = np.asarray(our_call(), np.float32)
        expected = torch_call().float()
        expected = (expected.permute(layout) if layout else expected).numpy()
        apart = np.abs(found - expected).max() / np.abs(expected).max()
        table.add_row(name, f"{1e3 * seconds(our_call, given.repeats):.0f}",
                      f"{1e3 * seconds(torch_call, given.repeats):.0f}", f"{apart:.1e}")
    Console().print(table)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
