"""Measures time and extra memory of loading and exporting at full size.

    python -m benchmarks.load --folder=/a/disk/with/room --out=docs/reports/performance.md

This writes a random UNet of SDXL's size (5.1 GB, float16). It loads the UNet in bfloat16 on 1 and
on 8 fake CPU devices, and reads the same file plainly in between. Then it exports a LoRA and a full
fine-tuning of the UNet, from checkpoints of 8 devices. Every measurement runs in its own process.
The files are deleted at the end. Linux only: memory is read from /proc.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.measure import publish
from configs import sdxl_r0
from r0_jax import cli
from r0_jax.errors import InputError
from r0_jax.export import folder as export
from r0_jax.files import read_json, write_bytes
from r0_jax.method import train_state
from r0_jax.method.generator import Generator
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.parallel import sharding
from r0_jax.stand_ins import miniature
from r0_jax.weights import convert, lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.weights.network import Network, Shapes
from r0_jax.weights.tensor_file import Tensor, write
from r0_jax.workdir.checkpoint_manager import Checkpoints
from r0_jax.workdir.workdir import LocalWorkdir

ROOT = Path(__file__).parent.parent
FAMILY = "StableDiffusionXLPipeline"
UNET = Path("pipeline", "unet")  # in the temporary folder
WEIGHTS = UNET / "diffusion_pytorch_model.safetensors"
TITLE = "## Loading and exporting"
SEED = 0
GB = 1e9


def define_flags() -> None:
    cli.define_path("folder", tempfile.gettempdir(), "folder for temporary files")
    cli.define_path("out", None, "Markdown file for the section; printed by default")
    cli.define_path(
        "config",
        str(ROOT / "r0_jax/stand_ins/published/stable_diffusion_xl/unet/config.json"),
        "of the UNet",
    )
    flags.DEFINE_integer("repeats", 3, "number of loads and of plain reads", lower_bound=1)
    flags.DEFINE_string("task", "", "internal: the task of a subprocess")


def network(fields: dict[str, Any]) -> Network:
    config = UNet2DConditionConfig.from_json(fields)
    return Network.abstract(lambda rngs: UNet2DConditionModel(config, rngs=rngs))


def size(shapes: Shapes, itemsize: int) -> int:
    return itemsize * sum(x.size for x in shapes.values())


# --- inputs: a pipeline and runs --------------------------------------------------------------


def random_leaves(shapes: Shapes, dtype: str) -> dict[str, Lazy]:
    """Return lazy tensors of small normal numbers; reading them draws the numbers."""
    rng = np.random.default_rng(SEED)
    return {
        name: lazy.computed(
            x.shape, dtype, lambda x=x: rng.standard_normal(x.shape, np.float32) * np.float32(0.02)
        )
        for name, x in shapes.items()
    }


def write_pipeline(folder: Path, fields: dict[str, Any]) -> None:
    """Write an SDXL folder with a full-size float16 UNet; the other parts are miniatures."""
    width = fields["cross_attention_dim"] // 2
    pooled = fields["projection_class_embeddings_input_dim"] - 6 * fields["addition_time_embed_dim"]
    miniature.write(
        folder / "pipeline",
        FAMILY,
        text_encoder={"hidden_size": width},
        text_encoder_2={"hidden_size": width, "projection_dim": pooled},
    )
    (folder / UNET / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    rng = np.random.default_rng(SEED)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        shape = convert.file_shape(name, shape)
        return Tensor(
            convert.to_key(name),
            shape,
            np.dtype(np.float16),
            lambda: (np.float32(0.02) * rng.standard_normal(shape, np.float32)).astype(np.float16),
        )

    write(folder / WEIGHTS, [tensor(name, x.shape) for name, x in network(fields).shapes.items()])


def write_run(folder: Path, fields: dict[str, Any], rank: int) -> None:
    """Write a workdir with one checkpoint, from all devices.

    With rank 0 all weights are trained. Then store only the average, to save disk space.
    """
    config = sdxl_r0.get_config()
    with config.unlocked():
        config.pretrained, config.lora.rank = str(folder / "pipeline"), rank
    workdir = folder / "run"
    write_bytes(workdir / "config.json", config.to_json().encode())
    shapes = network(fields).shapes
    generator = Generator(rank, config.lora.alpha, config.lora.targets)
    trained = (
        jax.eval_shape(lambda: generator.init(jax.random.key(0), shapes, shapes))
        if rank
        else {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in shapes.items()}
    )
    placed = lazy.place(random_leaves(trained, "float32"), split(trained))
    state = train_state.init({}, optax.sgd(0.0))._replace(ema_params=placed)
    with Checkpoints(LocalWorkdir(workdir)) as checkpoints:
        checkpoints.save(state)


def split(shapes: Shapes) -> dict[str, NamedSharding]:
    """Shard each tensor over all devices, along its largest divisible axis.

    Shard small tensors too: eight copies of them would not fit into one machine.
    """
    mesh = sharding.make_mesh({"fsdp": -1})

    def spec(shape: tuple[int, ...]) -> PartitionSpec:
        axes = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
        if not axes:
            return PartitionSpec()
        axis = max(axes, key=lambda axis: shape[axis])
        return PartitionSpec(*[None] * axis, "fsdp")

    return {name: NamedSharding(mesh, spec(x.shape)) for name, x in shapes.items()}


# --- measuring -------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Return bytes of memory: VmRSS (now) or VmHWM (the peak since `watched` began)."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1])


def watched(function: Callable[[], Any]) -> tuple[float, int, Any]:
    """Call a function; return seconds, peak of resident memory in bytes, and its result."""
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, resident("VmHWM"), result


def read_plainly(path: Path) -> float:
    """Read a file through one buffer; return the seconds."""
    buffer = memoryview(bytearray(2**22))
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def load(folder: Path, repeats: int) -> dict[str, float]:
    path, unet = folder / WEIGHTS, network(read_json(folder / UNET / "config.json"))
    mesh = sharding.make_mesh({"fsdp": -1})
    leaves = convert.open_params([path], unet, "bfloat16")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()}
    where = sharding.param_sharding(shapes, mesh, [(".*", "fsdp")])
    largest = max(x.size * x.dtype.itemsize for x in shapes.values())
    lazy.place({"warm": np.ones(8)}, sharding.replicated(mesh))
    read_plainly(path)
    before, plain, loaded, memory = resident("VmRSS"), [], [], []
    for _ in range(repeats):
        plain.append(read_plainly(path))
        seconds, peak, placed = watched(lambda: lazy.place(leaves, where))
        shards = sum(shard.data.nbytes for x in placed.values() for shard in x.addressable_shards)
        loaded.append(seconds)
        memory.append(peak - before - shards)
        del placed
    return {
        "devices": jax.device_count(),
        "bytes": path.stat().st_size,
        "shards": shards,
        "seconds": statistics.median(loaded),
        "plain": statistics.median(plain),
        "memory": max(memory),
        "largest": largest,
    }


def export_run(folder: Path, form: str) -> dict[str, float]:
    before = resident("VmRSS")
    seconds, peak, _ = watched(
        lambda: export.export(folder / "run", folder / "exported", form, dtype="float16")
    )
    unet = network(read_json(folder / UNET / "config.json"))
    largest = 4 * max(x.size for x in unet.shapes.values())  # merged in float32
    written = sum(path.stat().st_size for path in (folder / "exported").rglob("*.safetensors"))
    return {"seconds": seconds, "memory": peak - before, "largest": largest, "bytes": written}


# --- the whole -------------------------------------------------------------------------------


def run_task(task: str, folder: Path, fields: Path, repeats: int) -> Any:
    """Run one task of this process; return its result."""
    name, _, argument = task.partition(":")
    match name:
        case "pipeline":
            return write_pipeline(folder, read_json(fields))
        case "run":
            return write_run(folder, read_json(fields), int(argument))
        case "load":
            return load(folder, repeats)
        case "export":
            return export_run(folder, argument)
    raise InputError(f"--task={task} is unknown")


def start(task: str, folder: Path, fields: Path, devices: int = 8) -> Any:
    """Run a task in a new process on fake CPU devices; return its result."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.load",
        f"--task={task}",
        f"--folder={folder}",
        f"--config={fields}",
        f"--repeats={flags.FLAGS.repeats}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{shlex.join(command)} failed")
    found = json.loads(done.stdout.splitlines()[-1])
    print(task, devices, found, file=sys.stderr)
    return found


def check_room(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{folder} has {free / GB:.0f} GB free, but {needed / GB:.0f} GB "
            "are needed: give another --folder"
        )


def measure(folder: Path, fields: Path) -> dict[str, Any]:
    """Run all measurements in the order of the report.

    The disk holds at most two UNets and one checkpoint.
    """
    shapes = network(read_json(fields)).shapes
    check_room(folder, int(1.1 * size(shapes, 2 + 4 + 2)))
    start("pipeline", folder, fields)
    found: dict[str, Any] = {"load": [start("load", folder, fields, n) for n in (1, 8)]}
    rank = sdxl_r0.get_config().lora.rank
    start(f"run:{rank}", folder, fields)
    found["exports"] = {}
    for form in ("diffusers", "peft"):
        found["exports"][f"LoRA of rank {rank}, `--format={form}`"] = start(
            f"export:{form}", folder, fields
        )
        shutil.rmtree(folder / "exported")
    shutil.rmtree(folder / "run")
    start("run:0", folder, fields)
    count = sum(x.size for x in shapes.values())
    found["exports"][f"all {count / 1e9:.2f} G weights, `--format=diffusers`"] = start(
        "export:diffusers", folder, fields
    )
    return found


def text(found: dict[str, Any], command: str) -> str:
    """Return the section of the report."""
    loads = "".join(
        f"| {x['devices']} | {x['seconds']:.1f} | {x['bytes'] / GB / x['seconds']:.2f} | "
        f"{x['bytes'] / GB / x['plain']:.2f} | {x['shards'] / GB:.2f} | {x['memory'] / 1e6:.0f} | "
        f"{x['memory'] / x['largest']:.2f} |\n"
        for x in found["load"]
    )
    exports = "".join(
        f"| {name} | {x['seconds']:.0f} | {x['bytes'] / GB:.2f} | {x['memory'] / 1e6:.0f} | "
        f"{x['memory'] / x['largest']:.1f} |\n"
        for name, x in found["exports"].items()
    )
    first = found["load"][0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "numpy", "ml_dtypes", "safetensors", "orbax-checkpoint")
    )
    return f"""A UNet of {first["bytes"] / GB:.1f} GB in float16 is loaded in bfloat16 and sharded
by the rule `('.*', 'fsdp')` over fake CPU devices. Each device holds all tensors under 4 MB.
"plain" reads the same file and does nothing with it, in the same process between the loads. The
file is in the page cache as far as memory allows. Seconds are medians of {flags.FLAGS.repeats};
memory is the highest of them. The load average was {os.getloadavg()[2]:.0f} when it ended.

| devices | s | GB/s | plain GB/s | shards, GB | peak above them, MB | of the largest tensor |
|---:|---:|---:|---:|---:|---:|---:|
{loads}
Exports in float16, of checkpoints written by 8 devices. Memory is the peak above that of a process
that has imported the program. A tensor is merged in float32. Checkpoints are read by groups of at
most 128 MB.

| what | s | written, GB | peak, MB | of the largest tensor |
|---|---:|---:|---:|---:|
{exports}
    {command}

Python {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores ({cpu()}),
{memory:.0f} GiB; random weights of seed {SEED}.
"""


def cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    if given.task:
        print(
            json.dumps(run_task(given.task, Path(given.folder), Path(given.config), given.repeats))
        )
        return
    if not os.path.exists("/proc/self/clear_refs"):
        raise InputError("memory is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = measure(Path(folder), Path(given.config).absolute())
    section = text(
        found,
        shlex.join(
            [
                "python",
                "-m",
                "benchmarks.load",
                *(
                    f"--{name}={given[name].value}"
                    for name in ("config", "repeats", "out")
                    if given[name].present
                ),
            ]
        ),
    )
    publish(given.out, TITLE, section)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
