"""Real processes on this machine, started by launch/local.py: together, and when one goes wrong."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fault_world import ROOT, World, environment, measured
from process_program import STEPS, TROUBLED

from r0_jax.prompts import dataset
from r0_jax.prompts.order import Draws
from r0_jax.workdir import checkpoint
from r0_jax.workdir.workdir import LocalWorkdir

TROUBLES = (
    "input",
    "bug",
    "asked",
    "killed",
    "frozen",
    "hangs",
    "stuck",
    "differ",
    "absent",
    "full",
    "unread",
)


def launch(processes, *command, grace=60):
    return subprocess.Popen(
        [
            sys.executable,
            "launch/local.py",
            f"--processes={processes}",
            f"--grace={grace}",
            "--",
            *map(str, command),
        ],
        cwd=ROOT,
        env=environment(1),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """All troubles at once: they mostly wait."""
    folder = tmp_path_factory.mktemp("troubles")
    programs = {
        trouble: launch(
            2,
            "tests/support/process_program.py",
            trouble,
            folder / trouble,
            grace=20 if trouble == "frozen" else 60,
        )
        for trouble in TROUBLES
    }
    yield programs
    for program in programs.values():  # some may not have been asked for, and have a frozen child
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
        for child in children.read_text().split() if children.exists() else ():
            os.kill(int(child), signal.SIGKILL)
        program.kill()
        program.communicate()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def ended(program):
    """Status, and what it said on standard output and error."""
    out, err = program.communicate(timeout=900)
    return program.returncode, out, err


@pytest.mark.parametrize(
    ("trouble", "status", "said"),
    [
        (
            "input",
            2,
            [
                "[1] error: bad weights on this host",
                "[0] error: process 1 of 2: bad weights on this host",
            ],
        ),
        ("bug", 1, ["[1] RuntimeError: a bug", "[0] error: process 1 of 2: RuntimeError: a bug"]),
        ("asked", 75, ["[0] process 1 of 2: was asked to stop"]),
        (
            "killed",
            128 + signal.SIGKILL,
            [
                "[0] error: process 1 of 2 gave no sign of life for 8 s",
                "process 1 of 2 was ended by SIGKILL",
            ],
        ),
        (
            "frozen",
            1,
            [
                "[0] error: process 1 of 2 gave no sign of life for 8 s",
                "the others did not end within 20 s: stopping them",
            ],
        ),
        (
            "hangs",
            1,
            [
                f"[{i}] error: process 1 of 2 stands still for 6 s, after the batch of step "
                f"{TROUBLED - 1}"
                for i in range(2)
            ],
        ),
        ("stuck", 1, [" for 6 s, after the start"]),  # before anything was done
        (
            "full",
            2,
            [
                "[0] error: cannot write a checkpoint to ",
                "/checkpoints: file too large; older",
                "[1] error: process 0 of 2: cannot write a checkpoint to ",
            ],
        ),
        (
            "differ",
            2,
            [
                f"error: at step {TROUBLED} the copy of the sum in processes 0 and 1 of 2 "
                "differs from the others'"
            ],
        ),
        ("absent", 1, ["[0] error: not all 2 processes came together within 5 s"]),
    ],
)
def test_a_process_in_trouble_ends_all_with_a_line(started, trouble, status, said):
    found, out, err = ended(started[trouble])
    assert found == status, err
    for line in said:
        assert line in err, err
    assert ("Traceback" in err) == (trouble == "bug"), err
    assert f"step {STEPS} " not in out


def test_what_one_process_cannot_read_is_read_by_none(started):
    status, out, err = ended(started["unread"])
    assert status == 0, err
    assert re.findall(r"^\[\d\] restored (\d)$", out, re.MULTILINE) == ["1", "1"]
    assert "checkpoints/2 is damaged" in err and "2.damaged" in err


def test_four_processes_share_the_batches_and_agree(tmp_path):
    status, out, err = ended(launch(4, "tests/support/process_program.py", "none", tmp_path))
    assert status == 0 and not err, err
    rows = {}
    for process, step, numbers in re.findall(r"^\[(\d)\] step (\d) rows (.*)$", out, re.MULTILINE):
        rows[int(step), int(process)] = [int(number) for number in numbers.split()]
    whole = dataset.load(tmp_path / "prompts", Draws(32, 0))
    for step, batch in enumerate(itertools.islice(whole, STEPS), start=1):
        shared = itertools.chain.from_iterable(rows[step, i] for i in range(4))
        assert batch["number"].tolist() == list(shared)
    sums = re.findall(r"sum (\d+)", out)
    assert len(sums) == 4 * STEPS and len(set(sums)) == STEPS


def test_sigterm_to_one_process_stops_all_at_the_same_step(tmp_path):
    program = launch(2, "tests/support/process_program.py", "endless", tmp_path)
    for line in program.stdout:
        if "step 5 " in line:
            break
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    subprocess.run(["kill", "-TERM", children[1]], check=True)
    status, out, err = ended(program)
    stopped = re.findall(r"^\[\d\] stopped at step (\d+)$", out, re.MULTILINE)
    assert status == 0 and len(stopped) == 2 and len(set(stopped)) == 1, out + err


def test_two_processes_killed_and_started_again_equal_one(tmp_path):
    """The second time with weights split over the processes, and the newest checkpoint damaged."""
    steps = 16
    world = World(tmp_path, steps)
    flags = [
        f"--config={tmp_path / 'recipe.py'}",
        "--config.processes.lost_timeout=8",
        "--config.tensorboard=true",
        f"--workdir={tmp_path / 'two'}",
    ]
    program = launch(2, "-m", "r0_jax.main", *flags)
    deadline = time.monotonic() + 900
    while len(checkpoint.steps(LocalWorkdir(tmp_path / "two"))) < 2:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    subprocess.run(["kill", "-KILL", children[1]], check=True)
    status, _, err = ended(program)
    assert status == 128 + signal.SIGKILL and "Traceback" not in err, err
    assert "[0] error: process 1 of 2 gave no sign of life" in err

    before, newest = checkpoint.steps(LocalWorkdir(tmp_path / "two"))[-2:]
    assert newest < steps  # there is something left to do
    folder = tmp_path / "two" / "checkpoints" / str(newest)
    flip_a_bit(max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size))
    status, out, err = ended(
        launch(
            2,
            "-m",
            "fault_programs",
            "train",
            *flags,  # splits them all
            "--config.mesh.data=1",
            "--config.mesh.fsdp=2",
        )
    )
    assert status == 0, err
    assert f"checkpoint {folder} is damaged" in err and f"{newest}.damaged" in err, err
    assert f"[0] continues from step {before}" in out + err
    assert [line for line in (out + err).splitlines() if line.startswith("[1]")] == []
    one, two = measured(world.whole), measured(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    for field in ("params", "ema_params"):
        expected, _ = checkpoint.load_params(LocalWorkdir(world.whole), field)
        found, _ = checkpoint.load_params(LocalWorkdir(tmp_path / "two"), field)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["steps"] == steps
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 2  # one a start
