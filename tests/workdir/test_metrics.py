import json
import math
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from r0_jax.errors import InputError
from r0_jax.workdir.metrics import MetricWriter, Throughput


def read(folder):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_events(folder):
    """All events of a TensorBoard folder, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return events


def test_a_line_a_write_of_strict_json(tmp_path):
    with MetricWriter(tmp_path / "new" / "run", tensorboard=False) as writer:
        writer.write(1, {"train/loss": jnp.float32(0.1), "reward/颜色": np.float64(0.25), "n": 3})
        writer.write(2, {"train/loss": math.nan, "a": math.inf, "b": jnp.float32(-jnp.inf)})
        # Before close: a kill now must lose nothing.
        lines = read(tmp_path / "new" / "run")
    assert lines[0] == {
        "step": 1,
        "train/loss": float(np.float32(0.1)),
        "reward/颜色": 0.25,
        "n": 3,
    }
    assert lines[1] == {"step": 2, "train/loss": None, "a": None, "b": None}
    assert not (tmp_path / "new" / "run" / "tensorboard").exists()


def test_resume_drops_what_came_after_and_half_a_line(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"x": step})
        writer.write(2, {"eval": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 1, "x"')
    with MetricWriter(tmp_path, tensorboard=False, resume_step=2) as writer:
        writer.write(3, {"x": 30.0})
    assert [(line["step"], line.get("x")) for line in read(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (2, None),
        (3, 30.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with MetricWriter(tmp_path, tensorboard=False, resume_step=0):
        assert read(tmp_path) == []


def test_resume_drops_an_evaluation_that_comes_again(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (0, 2):
            writer.write(step, {"train/loss": step})
            writer.write(step, {"heldout/x": step, "hacking/contrast": 1})
    for evaluated in (True, False):
        with MetricWriter(tmp_path, tensorboard=False, resume_step=2, evaluated=evaluated):
            assert [line.get("heldout/x") for line in read(tmp_path)] == (
                [None, 0, None, 2] if evaluated else [None, 0, None]
            )


def test_without_resume_step_all_whole_lines_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 7, "x": 1}\n{"step": 8, "x": 2}\n{"step": 9, \xe9')
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, {"x": 3})
    assert [line["step"] for line in read(tmp_path)] == [7, 8, 10]


def test_a_kill_leaves_whole_lines(tmp_path):
    program = f"""
import os, signal
from r0_jax.workdir.metrics import MetricWriter
writer = MetricWriter({str(tmp_path)!r}, tensorboard=False)
writer.write(1, {{"x": 1.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert read(tmp_path) == [{"step": 1, "x": 1.5}]


def test_tensorboard_has_scalars_and_images(tmp_path):
    grid = np.zeros((4, 6, 3), np.uint8)
    grid[1, 2] = [10, 20, 30]
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"train/loss": 0.5, "bad": math.nan})
        writer.write_images(3, {"samples/ema": grid})
    with MetricWriter(tmp_path, resume_step=3) as writer:  # in the same second, too
        writer.write(4, {"train/loss": 0.25})
    events = read_events(tmp_path)
    values = [(e.step, value) for e in events for value in e.summary.value]
    scalars = [(step, v.tag, v.simple_value) for step, v in values if not v.HasField("image")]
    assert scalars[0] == (3, "train/loss", 0.5)
    assert scalars[1][1] == "bad" and math.isnan(scalars[1][2])
    assert scalars[2] == (4, "train/loss", 0.25)
    ((step, image),) = [(step, v) for step, v in values if v.HasField("image")]
    assert (step, image.tag) == (3, "samples/ema")
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(image.image.encoded_image_string)) as png:
        assert np.array_equal(np.asarray(png), grid)
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [4]  # TensorBoard hides older events from this step on


def test_wandb_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    MetricWriter(tmp_path, tensorboard=False).close()
    with pytest.raises(InputError, match="pip install wandb"):
        MetricWriter(tmp_path, tensorboard=False, wandb=True)

    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(
        init=lambda **kwargs: calls.append(kwargs) or run, Image=lambda image: image.shape
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (None, 1):
        with MetricWriter(
            tmp_path, tensorboard=False, wandb=True, resume_step=resume_step
        ) as writer:
            writer.write(1, {"x": 2.0})
            writer.write_images(1, {"grid": np.zeros((2, 3, 3), np.uint8)})
    assert calls[1:4] == [(1, {"x": 2.0}), (1, {"grid": (2, 3, 3)}), "end"]
    assert calls[0]["id"] == calls[4]["id"] and calls[0]["resume"] == "allow"

    def no_login(**kwargs):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(fake, "init", no_login)
    with pytest.raises(InputError, match=r"api_key not configured \(no-tty\).*wandb=False"):
        MetricWriter(tmp_path, tensorboard=False, wandb=True)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        MetricWriter(tmp_path / "file" / "run")


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_one_line_and_no_hang(tmp_path, tensorboard):
    program = f"""
import resource, sys
from r0_jax.errors import InputError
from r0_jax.workdir.metrics import MetricWriter
try:
    with MetricWriter({str(tmp_path)!r}, tensorboard={tensorboard}) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        for step in range(1000):
            writer.write(step, {{"x": 1.0, "y": 2.0}})
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("cannot write ") and done.stderr.count("\n") == 1, done.stderr
    # What is there is whole but for the end, and a later run goes on.
    with MetricWriter(tmp_path, tensorboard=False):
        assert [line["step"] for line in read(tmp_path)] == list(range(len(read(tmp_path))))
        assert len(read(tmp_path)) > 20


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"x": 1.0})
        writer.write_images(1, {"x": np.zeros((2, 2, 3), np.uint8)})
    assert not os.listdir(tmp_path)


def test_throughput_forgets_compilation_and_pauses():
    now = [0.0]
    pace = Throughput(steps=100, images_per_step=8, start_step=20, clock=lambda: now[0])

    def tick(seconds):
        now[0] += seconds

    tick(60.0)  # compilation, and step 21
    assert pace.update(21) == {
        "perf/images_per_sec": 8 / 60,
        "perf/seconds_left": 60.0 * 79,
    }
    tick(2.0)
    assert pace.update(22) == {"perf/images_per_sec": 4.0, "perf/seconds_left": 2.0 * 78}
    tick(2.0)
    with pace.paused():
        tick(1000.0)
    tick(1.0)
    first = pace.update(23)
    assert first["perf/images_per_sec"] == pytest.approx(8 / 3)
    assert first["perf/seconds_left"] == pytest.approx(2.5 * 77)
    tick(6.0)
    assert pace.update(26)["perf/images_per_sec"] == pytest.approx(4.0)
    tick(148.0)
    assert pace.update(100)["perf/seconds_left"] == 0.0
