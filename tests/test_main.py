"""The main job as a user starts it: a run, its resume, its bad input.

Kills and SIGTERM are test_faults.py's.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import tiny
from dry_runs import environment

from r0_jax.workdir import identity as workdirs

ROOT = Path(__file__).parent.parent
STEPS = 4

RECIPE = """
from r0_jax import config as base

def get_config():
    config = base.get_config()
    config.pretrained = {folder!r} + "/sd"
    config.data.prompts = {folder!r} + "/prompts.txt"
    clip = {folder!r} + "/clip"
    with config.unlocked():
        config.rewards.clip_score = base.reward_entry("clip_score", path=clip)
        config.heldout_rewards.heldout = base.reward_entry("clip_score", path=clip)
    config.regularizers.weight.weight = 1e-3
    config.steps, config.batch_size, config.sampler.num_steps = {steps}, 4, 2
    config.objective.grad_steps, config.lora.rank = 2, 4
    config.objective.normalization = "running_std"  # more state to resume with
    config.eval_every, config.checkpoint_every = 2, 1
    config.eval.num_prompts = config.eval.grid = 4
    config.best_metric = "heldout/heldout"
    config.optimizer.learning_rate = 1e-2
    config.compilation_cache = {folder!r} + "/cache"
    return config
"""


# As few layers as show what these tests are about: a start takes as long as it is traced.
ONE_LAYER = {"num_hidden_layers": 1}
UNET = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
TELL_IMPORTS = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module("r0_jax.main", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print({"torch", "tensorflow"} & set(sys.modules))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pretrained folders, prompts, a recipe, and one finished run with what it said."""
    folder = tmp_path_factory.mktemp("world")
    tiny.stable_diffusion(folder / "sd", seed=0, unet=UNET, text_encoder=ONE_LAYER)
    tiny.clip(folder / "clip", seed=1, text=ONE_LAYER, vision=ONE_LAYER)
    lines = [f"a red circle {i}" for i in range(9)] + ["一个红色圆形"]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.py").write_text(RECIPE.format(folder=str(folder), steps=STEPS))
    result = subprocess.run(
        [sys.executable, "-c", TELL_IMPORTS, "r0_jax.main", *flags_of(folder, folder / "whole")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout, "utf-8")
    (folder / "stderr.txt").write_text(result.stderr, "utf-8")
    return folder


def flags_of(world: Path, workdir: Path, *flags: str) -> list[str]:
    return [f"--config={world / 'recipe.py'}", f"--workdir={workdir}", *flags]


def starts(world: Path, *calls: tuple) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of one start after the other, each a workdir and flags."""
    calls = [("r0_jax.main", flags_of(world, *call)) for call in calls]
    return forks.run(calls, env=environment())


def measured(workdir: Path) -> list[dict]:
    """metrics.jsonl without the clock's numbers, all of a step in one."""
    found: dict[int, dict] = {}
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text("utf-8").splitlines()):
        found.setdefault(line["step"], {}).update(
            {k: v for k, v in line.items() if not k.startswith("perf/")}
        )
    return list(found.values())


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def one_line_error(started: tuple[int, str, str]) -> str:
    status, _, said = started
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2, said
    assert "Traceback" not in said
    assert len(errors) == 1
    return errors[0]


def test_a_run_leaves_what_it_promises(world):
    whole = world / "whole"
    lines = measured(whole)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "heldout/heldout" in line] == [0, 2, 4]
    assert all(
        {"reward/clip_score", "reward_std/clip_score"} <= line.keys()
        for line in lines
        if "train/loss" in line
    )
    assert {p.name for p in (whole / "samples").glob("*.png")} >= {
        "step_000000.png",
        "step_000002.png",
        "step_000004.png",
    }
    assert (whole / "report.html").stat().st_size > 10_000
    assert json.loads((whole / "config.json").read_text())["steps"] == STEPS
    [events] = (whole / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 3  # the grids of steps 0, 2, 4
    assert STEPS in checkpoints(whole)


def test_two_and_two_steps_are_four(world, tmp_path):
    calls = [(tmp_path / "w", "--config.steps=2"), (tmp_path / "w",)]
    for status, _, said in starts(world, *calls):
        assert status == 0, said
    resumed, whole = measured(tmp_path / "w"), measured(world / "whole")
    # The short run evaluated its last step, as the long one did there too.
    assert resumed == whole


def test_two_runs_do_not_share_a_folder(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "w")
    with workdirs.alone(tmp_path / "w"):
        [started] = starts(world, (tmp_path / "w",))
    assert f"another process is training in {tmp_path / 'w'}" in one_line_error(started)


def test_a_run_ends_early_when_the_held_out_reward_no_longer_grows(world, tmp_path):
    flags = ["--config.optimizer.learning_rate=0", "--config.eval_every=1", "--config.steps=9"]
    *twice, third = starts(
        world,
        (tmp_path / "w", *flags, "--config.early_stop=2"),
        (tmp_path / "w", *flags, "--config.early_stop=2"),  # it has nothing to do
        (tmp_path / "w", *flags, "--config.early_stop=3"),
    )
    for status, out, said in twice:
        assert status == 0, said
        assert "ended at step 2: in 2 evaluations heldout/heldout did not exceed" in said
        assert "report: " in out
    assert "\nstep " not in twice[1][2]
    assert third[0] == 0, third[2]
    assert "ended at step 3: in 3 evaluations" in third[2]
    assert [line["step"] for line in measured(tmp_path / "w")] == [0, 1, 2, 3]


def test_bad_input_is_one_line(world, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    shutil.copytree(world / "sd", tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cases = [
        (["--config.lora.rnak=3"], "lora.rank"),
        (["--config.batch_size=7", "--config.device_batch=2"], "batch_size=7"),
        (["--config.pretrained=/nowhere"], "/nowhere"),
        (["--config.data.prompts=/nowhere.txt"], "/nowhere.txt"),
        (["--config.objective.method=r1"], "r0plus"),
        (["--config.lora.targets=nothing"], "lora.targets"),
        (["--config.sampler.num_steps=51"], "sampler.num_steps=51 must be from 1 to 50"),
        (["--config.best_metric=heldout/hedlout"], "heldout/heldout"),
        (["--config.test.prompts=/nowhere.txt"], "/nowhere.txt"),
        ([f"--config.data.prompts={tmp_path / 'empty.txt'}"], "empty.txt"),
        ([f"--config.pretrained={tmp_path / 'sd'}"], weights.name),
        (
            ["--config.test.base_steps=2000", f"--config.test.prompts={world / 'prompts.txt'}"],
            "num_inference_steps=2000 is more than the 1000 timesteps",
        ),
    ]
    folders = [tmp_path / f"w{number}" for number in range(len(cases))]
    calls = [(workdir, *flags) for workdir, (flags, _) in zip(folders, cases, strict=True)]
    for workdir, (_, named), started in zip(folders, cases, starts(world, *calls), strict=True):
        assert named in one_line_error(started)
        assert not (workdir / "checkpoints").exists() or not checkpoints(workdir)
    assert not folders[-1].exists()  # a test that cannot be made shows before the training


def test_a_workdir_with_something_else_is_refused_and_stays(world, tmp_path):
    for name in ("other", "beyond"):
        shutil.copytree(world / "whole", tmp_path / name)
    prompts = tmp_path / "own" / "prompts"  # of the user's own
    shutil.copytree(world / "sd" / "tokenizer", prompts)
    before, files = checkpoints(world / "whole"), sorted(path.name for path in prompts.iterdir())
    other, beyond, own = starts(
        world,
        (tmp_path / "other", "--config.lora.rank=3"),
        (tmp_path / "beyond", "--config.steps=2"),
        (tmp_path / "own",),
    )
    assert "lora.rank" in one_line_error(other)
    assert checkpoints(tmp_path / "other") == before
    assert f"is at step {STEPS} already, beyond steps=2" in one_line_error(beyond)
    assert json.loads((tmp_path / "beyond" / "config.json").read_text())["steps"] == STEPS
    assert "is in the way" in one_line_error(own)
    assert files == sorted(path.name for path in prompts.iterdir())


def test_nonfinite_steps_stop_the_run(world, tmp_path):
    flags = [
        "--config.optimizer.learning_rate=1e30",
        "--config.max_skipped_in_a_row=2",
        "--config.steps=50",
        "--config.eval_every=100",
        "--config.eval.term_norms=False",
    ]
    [started] = starts(world, (tmp_path / "w", *flags))
    error = one_line_error(started)
    assert "the last 2 steps (to step" in error and "--workdir" in error


def test_neither_torch_nor_tensorflow_is_imported(world):
    assert (world / "stdout.txt").read_text("utf-8").strip().endswith("set()")


def test_signs_of_hacking_are_logged_and_an_overlap_is_told(world):
    said = (world / "stderr.txt").read_text("utf-8")
    assert "the held-out reward heldout is clip_score again, which is trained on" in said
    lines = (world / "whole" / "metrics.jsonl").read_text("utf-8").splitlines()
    signs = [
        {name: value for name, value in json.loads(line).items() if name.startswith("hacking/")}
        for line in lines
    ]
    signs = [found for found in signs if found]
    assert [found.pop("hacking/vetoed") for found in signs] == [0.0] * len(signs)
    names = "saturation contrast edges dark colour_entropy diversity grid_energy_4".split()
    assert signs[0].keys() == {f"hacking/{name}" for name in names}
    assert signs[0] == pytest.approx(dict.fromkeys(signs[0], 1.0), abs=1e-4)  # it is the base
    assert signs[-1] != signs[0]
