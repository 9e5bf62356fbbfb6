"""The main job as a user starts it: a run, its resume, its kill, its bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fast_xla
import pytest
import tiny

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


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pretrained folders, prompts, a recipe, and one finished run."""
    folder = tmp_path_factory.mktemp("world")
    tiny.stable_diffusion(folder / "sd", seed=0)
    tiny.clip(folder / "clip", seed=1)
    lines = [f"a red circle {i}" for i in range(9)] + ["一个红色圆形"]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.py").write_text(RECIPE.format(folder=str(folder), steps=STEPS))
    result = start(folder, folder / "whole")
    assert result.returncode == 0, result.stderr
    (folder / "stderr.txt").write_text(result.stderr, "utf-8")
    return folder


def command(world: Path, workdir: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "r0_jax.main",
        f"--config={world / 'recipe.py'}",
        f"--workdir={workdir}",
        *flags,
    ]


def start(world: Path, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(world, workdir, *flags),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": fast_xla.FLAGS,
    }


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


def one_line_error(result: subprocess.CompletedProcess) -> str:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
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
    assert start(world, tmp_path / "w", "--config.steps=2").returncode == 0
    assert start(world, tmp_path / "w").returncode == 0
    resumed, whole = measured(tmp_path / "w"), measured(world / "whole")
    # The short run evaluated its last step, as the long one did there too.
    assert resumed == whole


def test_a_killed_run_continues(world, tmp_path):
    workdir = tmp_path / "w"
    process = subprocess.Popen(
        command(world, workdir),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (workdir / "checkpoints").is_dir() and len(checkpoints(workdir)) > 0, process)
    process.kill()
    process.wait()
    assert start(world, workdir).returncode == 0
    assert measured(workdir) == measured(world / "whole")


def test_sigterm_saves_and_ends_as_what_is_to_be_started_again(world, tmp_path):
    workdir = tmp_path / "w"
    process = subprocess.Popen(
        command(world, workdir, "--config.steps=100000"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(
        lambda: (
            (workdir / "metrics.jsonl").is_file()
            and "train/loss" in (workdir / "metrics.jsonl").read_text()
        ),
        process,
    )
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    last = max(line["step"] for line in measured(workdir))
    assert max(checkpoints(workdir)) == last
    assert f"stopped at step {last}" in stderr


def test_two_runs_do_not_share_a_folder(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "w")
    with workdirs.alone(tmp_path / "w"):
        error = one_line_error(start(world, tmp_path / "w"))
        assert f"another process is training in {tmp_path / 'w'}" in error
    assert start(world, tmp_path / "w", "--config.test.prompts=").returncode == 0


def test_a_run_ends_early_when_the_held_out_reward_no_longer_grows(world, tmp_path):
    flags = ["--config.optimizer.learning_rate=0", "--config.early_stop=2", "--config.eval_every=1"]
    for _ in range(2):  # the second time it has nothing to do
        ended = start(world, tmp_path / "w", "--config.steps=9", *flags)
        assert ended.returncode == 0, ended.stderr
        assert "ended at step 2: in 2 evaluations heldout/heldout did not exceed" in ended.stderr
        assert "report: " in ended.stdout
        assert [line["step"] for line in measured(tmp_path / "w")] == [0, 1, 2]
    assert (
        start(
            world,
            tmp_path / "w",
            "--config.steps=9",
            *flags,
            "--config.early_stop=3",
        ).returncode
        == 0
    )
    assert [line["step"] for line in measured(tmp_path / "w")] == [0, 1, 2, 3]


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_config_is_refused_and_checkpoints_stay(world, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(world / "whole", workdir)
    before = checkpoints(workdir)
    error = one_line_error(start(world, workdir, "--config.lora.rank=3"))
    assert "lora.rank" in error
    assert checkpoints(workdir) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.lora.rnak=3"], "lora.rank"),
        (["--config.batch_size=7", "--config.device_batch=2"], "batch_size=7"),
        (["--config.pretrained=/nowhere"], "/nowhere"),
        (["--config.data.prompts=/nowhere.txt"], "/nowhere.txt"),
        (["--config.objective.method=r1"], "r0plus"),
        (["--config.lora.targets=nothing"], "lora.targets"),
        (["--config.sampler.num_steps=51"], "sampler.num_steps=51 must be from 1 to 50"),
        (["--config.best_metric=heldout/hedlout"], "heldout/heldout"),
        (["--config.test.prompts=/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, flags, named):
    assert named in one_line_error(start(world, tmp_path / "w", *flags))
    assert not (tmp_path / "w" / "checkpoints").exists() or not checkpoints(tmp_path / "w")


def test_a_prompts_folder_of_the_users_own_is_not_touched(world, tmp_path):
    shutil.copytree(world / "sd" / "tokenizer", tmp_path / "w" / "prompts")
    before = sorted(path.name for path in (tmp_path / "w" / "prompts").iterdir())
    assert "is in the way" in one_line_error(start(world, tmp_path / "w"))
    assert before == sorted(path.name for path in (tmp_path / "w" / "prompts").iterdir())


def test_fewer_steps_than_there_are(world, tmp_path):
    shutil.copytree(world / "whole", tmp_path / "w")
    error = one_line_error(start(world, tmp_path / "w", "--config.steps=2"))
    assert f"is at step {STEPS} already, beyond steps=2" in error
    assert json.loads((tmp_path / "w" / "config.json").read_text())["steps"] == STEPS


def test_an_empty_prompt_file_and_a_truncated_weight_file(world, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    error = one_line_error(
        start(world, tmp_path / "w", f"--config.data.prompts={tmp_path / 'empty.txt'}")
    )
    assert "empty.txt" in error
    shutil.copytree(world / "sd", tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = one_line_error(start(world, tmp_path / "w", f"--config.pretrained={tmp_path / 'sd'}"))
    assert weights.name in error


def test_a_test_that_cannot_be_made_shows_before_the_training(world, tmp_path):
    error = one_line_error(
        start(
            world,
            tmp_path / "w",
            "--config.test.base_steps=2000",
            f"--config.test.prompts={world / 'prompts.txt'}",
        )
    )
    assert "num_inference_steps=2000 is more than the 1000 timesteps" in error
    assert not (tmp_path / "w").exists()


def test_nonfinite_steps_stop_the_run(world, tmp_path):
    error = one_line_error(
        start(
            world,
            tmp_path / "w",
            "--config.optimizer.learning_rate=1e30",
            "--config.max_skipped_in_a_row=2",
            "--config.steps=50",
            "--config.eval_every=100",
        )
    )
    assert "the last 2 steps (to step" in error and "--workdir" in error


def test_neither_torch_nor_tensorflow_is_imported(world, tmp_path):
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_module('r0_jax.main', run_name='__main__')\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        "print({'torch', 'tensorflow'} & set(sys.modules))"
    )
    args = command(world, tmp_path / "w", "--config.steps=1")[2:]
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.stdout.strip().endswith("set()"), result.stderr


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
