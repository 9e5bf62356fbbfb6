"""`python -m r0_jax.plan` as a user runs it, on recipes in miniature."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import fast_xla
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dry_runs import cache  # noqa: F401 (a fixture)
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from configs import sd3_r0, sd15_r0, sdxl_r0, taiyi_r0
from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.evaluation.programs import Stage
from r0_jax.parallel import sharding
from r0_jax.plan import flops, hlo_cost, memory, need, predict, stages, suggestions, weightless
from r0_jax.plan.plan import Bounds, Measured, Memory, Need, Plan
from r0_jax.plan.topology import Chip
from r0_jax.prompts import encoded_writer

ROOT = Path(__file__).parents[2]
libtpu = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('libtpu')",
    reason="the TPU compiler is in requirements-tpu.txt",
)


def run(*flags: str, recipe: str = "sd15_r0.py:dryrun,r0plus") -> subprocess.CompletedProcess:
    flags_of_xla = f"{fast_xla.FLAGS} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags_of_xla}
    environment.pop("JAX_PLATFORMS", None)
    return subprocess.run(
        [sys.executable, "-m", "r0_jax.plan", f"--config=configs/{recipe}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_measured_on_this_machine():
    ended = run("--topology=cpu", "--json", "--config.mesh.fsdp=2", "--config.mesh.data=1")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)  # and nothing else
    assert found.keys() == fields(Plan)
    assert found["memory"].keys() == fields(Memory)
    names = [program["program"] for program in found["programs"]]
    assert names[:3] == ["training step", "drawing", "signs of hacking"]
    assert {"reward pickscore", "table: drawing", "table: reward hps_v2_1"} < set(names)
    assert all(program.keys() == fields(Need) for program in found["programs"])
    largest = max(found["programs"], key=lambda program: program["peak_bytes"])
    assert found["evaluation"] is True
    assert found["memory"]["program"] == largest["program"]
    assert found["memory"]["peak_bytes"] == largest["peak_bytes"]
    assert found["measured"].keys() == fields(Measured)
    assert found["chips"] == 2 and found["memory"]["fits"] is True
    assert found["bounds"] is None
    measured, held = found["measured"], found["memory"]
    assert measured["seconds_per_step"] > 0
    assert measured["images_per_sec"] == pytest.approx(4 / measured["seconds_per_step"])
    assert found["flops_per_step"] >= found["model_flops_per_step"] > 0
    assert held["peak_bytes"] == pytest.approx(sum(held["by_kind"].values()))


@libtpu
def test_compiled_for_a_slice_that_is_not_there():
    ended = run("--topology=v5e-4", "--json", "--noevaluation")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["chips"] == 4 and found["memory"]["fits"] is True
    assert found["measured"] is None
    bounds = found["bounds"]
    assert bounds.keys() == fields(Bounds)
    assert bounds["hbm_bytes"] > 0 and sum(bounds["sent_bytes"].values()) > 0
    assert bounds["bound_by"] == max(bounds["seconds"], key=bounds["seconds"].get)
    assert 0 < bounds["mfu"] < 1
    assert bounds["dcn_bytes"] == 0 and "dcn" not in bounds["seconds"]
    assert [program["program"] for program in found["programs"]] == ["training step"]
    flags = ("--config.batch_size=8", "--config.mesh.fsdp=4", "--noevaluation")
    said = run("--topology=2xv5e-4", *flags).stdout
    assert "only the training step was planned" in said
    assert "fits" in said and "bound by" in said and "compiled in" in said
    assert "GB to other slices" in said and ", dcn " in said


CHIP = Chip(
    "toy",
    hbm_bytes=100.0,
    flops=10.0,
    hbm_bandwidth=4.0,
    ici_bandwidth=2.0,
    dcn_bandwidth=1.0,
    cores=1,
)


def test_the_longest_of_the_bounds_decides():
    """Of 2 chips and 6 images: 3 s for FLOPs, 5 s for memory, 4 s for what chips send."""
    costs = hlo_cost.Cost(20.0, {"all-gather": 6.0, "all-reduce": 2.0}, 0.0)
    found = predict._bounds(costs, flops.Flops(60.0, 40.0), CHIP, 2, 6)
    assert found == Bounds(
        hbm_bytes=20.0,
        sent_bytes={"all-gather": 6.0, "all-reduce": 2.0},
        dcn_bytes=0.0,
        seconds={"compute": 3.0, "hbm": 5.0, "interconnect": 4.0},
        bound_by="hbm",
        images_per_sec=6 / 5,
        mfu=40 / 5 / 2 / 10,
    )
    slow = predict._bounds(hlo_cost.Cost(dcn_bytes=9.0), flops.Flops(60.0, 40.0), CHIP, 2, 6)
    assert slow.seconds["dcn"] == 9.0 and slow.bound_by == "dcn"


class Program(jax.stages.Compiled):
    """A program of 30 bytes and 5 bytes of code."""

    def __init__(self):
        pass

    def memory_analysis(self):
        return types.SimpleNamespace(peak_memory_in_bytes=30, generated_code_size_in_bytes=5)


class Lowered(jax.stages.Lowered):
    """A program that the compiler has room for, unless there is an error."""

    def __init__(self, error: str):
        self.error = error

    def compile(self, compiler_options):
        assert compiler_options == {"exec_time_optimization_effort": -0.5}
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return Program()


class Traced(jax.stages.Traced):
    jaxpr = None

    def __init__(self, traced: jax.stages.Traced, error: str):
        self.jaxpr, self.error = traced.jaxpr, error

    def lower(self, *, lowering_platforms):
        assert lowering_platforms == ("tpu",)
        return Lowered(self.error)


def placed(size: int) -> jax.ShapeDtypeStruct:
    whole = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
    return jax.ShapeDtypeStruct((size,), jnp.int8, sharding=whole)


def compiled(error: str = "", unread: int = 2) -> tuple[need.Compiled, object]:
    """Return what is said of a program that reads 8 of the bytes that lie on a chip."""
    read, held = placed(8), {"parameters": placed(unread)}
    traced = jax.jit(lambda x: 2 * x).trace(read)
    stage = Stage("drawing", jax.jit(lambda x: x), (read,), {"ema": read} | held)
    planned = stages.Planned(stage, lambda kinds, over: [f"{over:.0f} bytes less"], "training")
    return predict._compile(planned, Traced(traced, error), -0.5)


@pytest.mark.parametrize(("unread", "fits"), [(65, True), (66, False)])
def test_what_a_program_does_not_read_takes_room_too(unread, fits):
    found, program = compiled(unread=unread)
    assert program is not None
    total = need.total([found], 100.0)
    assert total.memory == Memory(
        fits,
        program="drawing",
        peak_bytes=35.0 + unread,
        limit_bytes=100.0,
        by_kind={"ema": 8.0, "parameters": unread, "code": 5.0, "activations": 22.0},
    )
    assert total.needs[0].working_bytes == 22.0
    assert total.suggestions == ([] if fits else ["1 bytes less"])


def test_a_program_without_room():
    error = "RESOURCE_EXHAUSTED: ... HLO temporaries (2.00K) exceeds available HBM"
    found, program = compiled(error)
    assert program is None
    total = need.total([found], 1e6)
    assert not total.memory.fits and total.memory.peak_bytes == 2050.0
    assert total.memory.by_kind["activations"] == 2040.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled("INTERNAL: something else")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v7-8"], "--topology=v7-8 is unknown"),
        (
            ["--topology=cpu", "--config.batch_size=3"],
            "batch_size=3 does not split over 2 device(s)",
        ),
        (["--topology=local"], "JAX finds no accelerator here"),
        ([], "topology"),
        (["--topology=cpu", "--config.family=Foo"], "family='Foo' is unknown"),
    ],
)
def test_wrong_flags_give_one_line(flags, said):
    ended = run(*flags)
    assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr
    assert not ended.stdout


def test_without_weights_and_without_a_family():
    config = sd15_r0.get_config()
    config.family = ""
    with pytest.raises(InputError, match="pretrained is not set"), weightless.filled(config):
        pass


def test_what_is_not_there_is_filled_in_and_named(cache, tmp_path, capsys):  # noqa: F811
    config = taiyi_r0.get_config("dryrun")
    there, config.family = config.pretrained, ""
    config.objective.decoder = str(tmp_path / "nowhere")
    config.rewards.chinese_clip.path = ""
    with weightless.filled(config) as filled:
        assert filled.pretrained == there and filled.objective.decoder.endswith("decoder")
        assert filled.rewards.chinese_clip.path and config.rewards.chinese_clip.path == ""
    assert capsys.readouterr().err == (
        "not there, planned with the published sizes: taesd, chinese_clip\n"
    )


def test_a_reward_of_ones_own_with_features_of_prompts(cache, monkeypatch):  # noqa: F811
    def score(images, features):
        return jnp.mean(images, axis=(1, 2, 3)) * features[:, 0]

    module = types.ModuleType("with_features")
    module.score, module.score_text_features = (
        score,
        lambda prompts: np.ones((len(prompts), 5), np.float32),
    )
    monkeypatch.setitem(sys.modules, "with_features", module)
    config = sd15_r0.get_config("dryrun")
    with config.unlocked():
        config.rewards.mine = base.reward_entry("function", function="with_features:score")
    built = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1]))
    assert built.abstract[2]["features/mine"].shape == (config.batch_size, 5)
    # Which the step reads. Towers of text whose features came with the batch are not there at all;
    # the encoder of the VAE is, though nobody looks at it.
    trace = built.step.trace(*built.abstract)
    _, used = partial_eval.dce_jaxpr(trace.jaxpr.jaxpr, [True] * len(trace.jaxpr.jaxpr.outvars))
    unused = [
        jax.tree_util.keystr(path)
        for (path, _), is_used in zip(
            jax.tree_util.tree_leaves_with_path(built.abstract), used, strict=True
        )
        if not is_used
    ]
    assert any("encoder.conv_in" in name for name in unused)
    assert not any("features" in name or ".params" in name for name in unused)
    assert not any(
        "text_model" in name for reward in built.frozen["rewards"].values() for name in reward
    )
    assert memory.beside(trace.jaxpr.jaxpr, built.abstract, memory.held(built)) > 0


def test_prompts_that_were_encoded_with_rewards_that_are_not_here(cache, tmp_path):  # noqa: F811
    config, rng = sdxl_r0.get_config("dryrun"), np.random.default_rng(0)
    shapes = {
        "prompt_embeds": (7, 40),
        "pooled_prompt_embeds": (12,),
        "features/hps_v2_1": (8,),
        "features/clip_score": (8,),
    }
    columns = {name: rng.standard_normal((2, *shape), np.float32) for name, shape in shapes.items()}
    negative = {name: columns[name][:1] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    columns |= {"prompt": ["a", "b"], "features/image_reward": np.ones((2, 35), np.int32)}
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    for name, given in (("with", negative), ("without", None)):
        encoded_writer.write(tmp_path / name, columns, negative=given)
        file = tmp_path / name / "metadata.json"
        other = {"weights": "0123456789abcdef", "function": ""}  # than those that stand in
        file.write_text(
            json.dumps(json.loads(file.read_text("utf-8")) | {"rewards": {"clip_score": other}}),
            "utf-8",
        )
    config.data.encoded = str(tmp_path / "with")
    built = weightless.load(config, mesh)
    assert built.abstract[2]["prompt_embeds"].shape == (config.batch_size, 7, 40)
    config.data.encoded = str(tmp_path / "without")
    with pytest.raises(InputError, match="no split 'negative', the embedding of the empty prompt"):
        weightless.load(config, mesh)


@pytest.mark.parametrize(("recipe", "count"), [(sd15_r0, 2), (sd3_r0, 1)])
def test_chips_that_repeat_each_other(cache, recipe, count):  # noqa: F811
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    assert flops.repeated(weightless.load(recipe.get_config("dryrun"), mesh)) == count


def test_suggestions_go_with_the_tensor_that_is_given(cache):  # noqa: F811
    config = sd3_r0.get_config("dryrun")
    config.batch_size = 8

    def suggested(**sizes):
        built = weightless.load(config, sharding.make_mesh(sizes))
        kinds = memory.bytes_by_kind(memory.held(built)) | {"activations": 1.0}
        return suggestions.for_step(built, kinds, 1.0)

    found = suggested(data=4, tensor=2)
    assert found[0].startswith("--config.mesh.data=1 --config.mesh.fsdp=4: ")
    assert not any("two chips" in line for line in found)
    assert any(
        "--config.mesh.fsdp=4 --config.mesh.tensor=2 --config.device_batch=1" in line
        for line in suggested(fsdp=8)
    )


@pytest.fixture
def full() -> ConfigDict:
    return sd15_r0.get_config("dryrun,full")


def test_what_is_suggested(full):
    """Of what a config does not do yet, the cheapest first."""
    mesh = sharding.make_mesh({"data": -1}, jax.devices())
    full.batch_size, full.device_batch, full.remat = 16, 2, "calls"
    with weightless.filled(full) as config:
        built = weightless.load(config, mesh)
        kinds = memory.bytes_by_kind(memory.held(built)) | {"activations": 8.0 * 2**30}
        found = suggestions.for_step(built, kinds, 2.0**30)
    starts = [
        "--config.mesh.data=1 --config.mesh.fsdp=8",
        "--config.remat=blocks",
        "--config.device_batch=1: 4.0 GiB of 1.0",
        "prompts encoded before",
        "--config.objective.decoder",
        "adapters instead of all weights",
    ]
    assert len(found) == len(starts)
    assert all(map(str.startswith, found, starts))


def test_memory_by_kind_is_that_of_the_arrays(full):
    """With the state and frozen weights split over 8 devices, each has the share it says."""
    mesh = sharding.make_mesh({"fsdp": 8}, jax.devices())
    with weightless.filled(full) as config:
        config.batch_size = 8
        built = weightless.load(config, mesh)
        kinds = memory.bytes_by_kind(memory.held(built))
        state = jax.jit(built.init, out_shardings=built.state_sharding)(
            {name: jax.numpy.zeros(x.shape, x.dtype) for name, x in built.frozen["base"].items()}
        )
    held = sum(
        shard.data.nbytes
        for x in jax.tree.leaves((state.params, state.ema_params))
        for shard in x.addressable_shards
        if shard.device == jax.devices()[3]
    )
    assert kinds["parameters"] + kinds["ema"] == held


def test_what_the_compiler_says_when_memory_runs_out():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.32G) exceeds available HBM (15.75G)."
    )
    assert memory.needed(said) == 18.32 * 2**30
    assert memory.needed("INTERNAL: something else") is None
    assert (
        memory.needed(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used "
            "19.01M of 16.00M vmem."
        )
        is None
    )
