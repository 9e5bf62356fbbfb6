"""What a training step needs and what bounds it, from the compiled program.

FLOPs are counted in the jaxpr, bytes in the optimized HLO: the compiler's own counts take the body
of a loop once. docs/scale.md says how every figure comes about.
"""

import contextlib
import copy
import dataclasses
import math
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval
from jax.sharding import Mesh
from ml_collections import ConfigDict

from r0_jax import config_check, prompts, remote, rewards
from r0_jax.console import console
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.pipelines.folder import read_index
from r0_jax.plan import hlo_cost, jaxpr_cost
from r0_jax.plan.topology import Chip
from r0_jax.stand_ins import blank
from r0_jax.training import program
from r0_jax.training.program import Program

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `--json` prints, with `fields` of docs/scale.md; None where it is not known."""

    topology: str
    chips: int
    batch_size: int
    fits: bool
    peak_bytes_per_chip: float
    hbm_bytes_per_chip: float
    bytes_per_chip: dict[str, float]
    flops_per_step: float
    model_flops_per_step: float
    bytes_accessed: float | None
    collective_bytes: float | None
    collective_bytes_by_kind: dict[str, float] | None
    dcn_bytes: float | None
    seconds: dict[str, float] | None
    measured_seconds_per_step: float | None
    bound_by: str | None
    predicted_images_per_sec: float | None
    predicted_mfu: float | None
    trace_seconds: float
    compile_seconds: float
    host_bytes: float
    suggestions: list[str]


@contextlib.contextmanager
def filled(config: ConfigDict) -> Iterator[ConfigDict]:
    """The config with weights of zeros, of the published sizes, in place of what is not set or not
    there, which a line on standard error names: they lie in a temporary folder that takes no
    room."""
    families.check_family(config.family)
    config, missing = copy.deepcopy(config), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if config.family and not _is_there(config.pretrained):
            # A reward that reads Chinese goes with a pipeline that does.
            chinese = any(entry.type == "chinese_clip" for entry in config.rewards.values())
            missing.append(blank.write_pipeline(root / "pipeline", config.family, chinese))
            config.pretrained = str(root / "pipeline")
        families.check_there(config.pretrained, config.family)
        if config.objective.decoder and not _is_there(config.objective.decoder):
            family = read_index(remote.local(config.pretrained))["_class_name"]
            missing.append(blank.write_decoder(root / "decoder", family))
            config.objective.decoder = str(root / "decoder")
        for reward, entry in config.rewards.items():
            if entry.type != "function" and not _is_there(entry.path):
                missing.append(blank.write_reward(root / reward, entry.type))
                entry.path, entry.head = str(root / reward), ""
        if missing:
            console.print(
                f"not there, planned with the published sizes: {', '.join(missing)}",
                highlight=False,
                soft_wrap=True,
            )
        if not (config.data.prompts or config.data.encoded):
            (root / "prompts.txt").write_text("a prompt\n", encoding="utf-8")
            config.data.prompts = str(root / "prompts.txt")
        yield config


def _is_there(path: str) -> bool:
    return bool(path) and (remote.url_of(path) is not None or Path(path).exists())


def load(config: ConfigDict, mesh: Mesh) -> Program:
    """The config's program; whether its rewards are sound is for the training to say."""
    source = prompts.of(config)
    pipeline = families.load(config.pretrained, config.dtype, config.family, text=source.text)
    trained_on = [
        rewards.load(name, entry, config.dtype, source.text)
        for name, entry in config.rewards.items()
    ]
    pipeline = source.attach(pipeline)
    if config.regularizers.guidance.weight:
        source.check_guidance("regularizers.guidance")
    return program.build(config, mesh, pipeline, trained_on, source)


def predict(config: ConfigDict, name: str, chip: Chip, devices: list[Any], effort: float) -> Plan:
    """Compiles the step of a config for the devices of a slice."""
    config_check.check_config(config, devices[0])
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    sharding.microbatches(config.batch_size, config.device_batch, mesh)
    built = load(config, mesh)
    begin = time.perf_counter()
    traced = built.step.trace(*built.abstract)
    trips = expected_trips(config)
    executed = jaxpr_cost.flops(traced.jaxpr.jaxpr, trips, repeated(built))
    model = model_flops(config, built, trips)
    lowered = traced.lower(lowering_platforms=("tpu",))
    middle = time.perf_counter()
    kinds = bytes_by_kind(built)
    beside = unused_bytes(traced.jaxpr.jaxpr, built)
    try:
        compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": effort})
    except jax.errors.JaxRuntimeError as error:
        if (said := needed(str(error))) is None:
            raise
        compiled, costs, peak = None, None, said + beside
    else:
        memory = compiled.memory_analysis()
        # Not temp_size_in_bytes, which counts what never lives at once.
        peak = float(memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes) + beside
        kinds["code"] = float(memory.generated_code_size_in_bytes)
        costs = hlo_cost.cost(compiled.as_text(), trips)
    end = time.perf_counter()
    kinds["activations"] = peak - sum(kinds.values())
    fits = compiled is not None and peak <= chip.hbm_bytes
    seconds = (
        None
        if costs is None
        else {
            "compute": executed / mesh.size / chip.flops,
            "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
            "interconnect": sum(costs.collective_bytes.values()) / chip.ici_bandwidth,
        }
    )
    if costs and costs.dcn_bytes and chip.dcn_bandwidth:
        seconds["dcn"] = costs.dcn_bytes / chip.dcn_bandwidth
    longest = seconds and max(seconds.values())
    return Plan(
        topology=name,
        chips=mesh.size,
        batch_size=config.batch_size,
        fits=fits,
        peak_bytes_per_chip=peak,
        hbm_bytes_per_chip=chip.hbm_bytes,
        bytes_per_chip=kinds,
        flops_per_step=executed,
        model_flops_per_step=model,
        bytes_accessed=costs and costs.hbm_bytes,
        collective_bytes=costs and sum(costs.collective_bytes.values()),
        collective_bytes_by_kind=costs and costs.collective_bytes,
        dcn_bytes=costs and costs.dcn_bytes,
        seconds=seconds,
        measured_seconds_per_step=None,
        bound_by=seconds and max(seconds, key=seconds.get),
        predicted_images_per_sec=longest and config.batch_size / longest,
        predicted_mfu=longest and model / longest / mesh.size / chip.flops,
        trace_seconds=middle - begin,
        compile_seconds=end - middle,
        host_bytes=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        suggestions=[] if fits else suggest(config, built, kinds, peak - chip.hbm_bytes),
    )


def expected_trips(config: ConfigDict) -> float:
    """Of the one loop whose length is drawn: the calls of R0+ that come before the graded one."""
    return (config.sampler.num_steps - 1) / 2 if config.objective.method == "r0plus" else 1.0


def model_flops(config: ConfigDict, built: Program, trips: float) -> float:
    """Operations of a step that computes nothing twice and fills no tiles."""
    plain = copy.deepcopy(config)
    plain.remat, plain.attention = "none", "xla"
    other = built.changed(config=plain)
    return jaxpr_cost.flops(other.step.trace(*other.abstract).jaxpr.jaxpr, trips)


def bytes_by_kind(built: Program) -> dict[str, float]:
    """Of a chip, what lies there from step to step."""
    state, frozen, batch, _ = built.abstract
    rest = state._replace(params={}, ema_params={})
    networks = {name: part for name, part in frozen.items() if name not in ("rewards", "empty")}
    kinds = {
        "parameters": state.params,
        "ema": state.ema_params,
        "optimizer": rest,
        **{f"frozen {name}": part for name, part in networks.items()},
        **{f"frozen {name}": part for name, part in frozen["rewards"].items()},
        "batch": batch,
    }
    return {
        kind: float(sum(map(_shard_bytes, jax.tree.leaves(tree)))) for kind, tree in kinds.items()
    }


def unused_bytes(step: Jaxpr, built: Program) -> float:
    """Of a chip: weights that lie there while the step runs, which takes them but does not look at
    them, and which the compiler leaves out: the VAE's encoder, text encoders' last layers."""
    _, used = partial_eval.dce_jaxpr(step, [True] * len(step.outvars))
    leaves = jax.tree.leaves(built.abstract)
    return float(
        sum(_shard_bytes(x) for x, is_used in zip(leaves, used, strict=True) if not is_used)
    )


def repeated(built: Program) -> int:
    """How many chips do the same: those of one `tensor`, unless it splits the generator."""
    weights = jax.tree.leaves(built.abstract_frozen["base"])
    split = any("tensor" in jax.tree.leaves(tuple(x.sharding.spec)) for x in weights)
    return 1 if split else built.mesh.shape["tensor"]


def suggest(config: ConfigDict, built: Program, kinds: dict[str, float], over: float) -> list[str]:
    """What would make it fit, the cheapest first, with what each spares a chip."""
    chips = built.mesh.size
    found = []
    devices = list(built.mesh.devices.flat)
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # which fsdp stays in
    tensor = built.mesh.shape["tensor"]
    fsdp = chips // slices // tensor
    if built.mesh.shape["fsdp"] < fsdp and config.batch_size % (slices * fsdp) == 0:
        whole = sharding.make_mesh({"data": slices, "fsdp": fsdp, "tensor": tensor}, devices)
        split = bytes_by_kind(built.changed(mesh=whole))
        found.append(
            (
                f"--config.mesh.data={slices} --config.mesh.fsdp={fsdp}",
                sum(kinds[kind] - size for kind, size in split.items()),
            )
        )
    if config.remat != "blocks":
        found.append(("--config.remat=blocks", None))
    share = config.batch_size // sharding.batch_parts(built.mesh)
    if (at_once := min(config.device_batch or share, share)) > 1:
        found.append(("--config.device_batch=1", kinds["activations"] * (1 - 1 / at_once)))
    if not config.data.encoded:
        text = sum(size for kind, size in kinds.items() if kind.startswith("frozen text"))
        found.append(("prompts encoded before (r0_jax.encode_prompts)", text))
    if not config.objective.decoder:
        found.append(("--config.objective.decoder=PATH of a tiny autoencoder (TAESD)", None))
    if not config.lora.rank:
        found.append(
            (
                "adapters instead of all weights (--config.lora.rank=32)",
                kinds["parameters"] + kinds["ema"] + kinds["optimizer"],
            )
        )
    if tensor == share == 1 and fsdp % 2 == 0:
        pairs = sharding.make_mesh({"data": slices, "fsdp": fsdp // 2, "tensor": 2}, devices)
        if repeated(built.changed(mesh=pairs)) == 1:
            found.append(
                (
                    f"two chips a sample (--config.mesh.data={slices} --config.mesh.fsdp="
                    f"{fsdp // 2} --config.mesh.tensor=2 --config.device_batch=1)",
                    None,
                )
            )
    return [
        what if saved is None else f"{what}: {saved / _GIB:.1f} GiB of {over / _GIB:.1f}"
        for what, saved in found
    ]


def needed(said: str) -> float | None:
    """What the TPU's compiler says that a chip needs, arguments included, where it ran out of
    memory; None where it says something else."""
    match = re.search(r"(?:HLO temporaries \(?|Used )([\d.]+)([KMG])(?! of \S+ [sv]mem)", said)
    return match and float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]


def _shard_bytes(x: jax.ShapeDtypeStruct) -> float:
    return float(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize)
