"""What `make fullsize` works on and measures with; the whole takes hours."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.fullsize import folders, phases, report, setting
from benchmarks.fullsize.setting import Places, Setting
from benchmarks.fullsize.watch import Window, never, watch
from r0_jax.errors import InputError
from r0_jax.pipelines import tokenizers
from r0_jax.stand_ins import miniature_tokenizer


def test_zeros_become_random_weights_that_keep_the_size_of_activations(tmp_path):
    shapes = {"a.weight": (64, 32, 3, 3), "norm.weight": (500,), "a.bias": (500,)}
    save_file({name: np.zeros(x, np.float32) for name, x in shapes.items()}, tmp_path / "a.st")
    folders.fill(tmp_path / "a.st", tmp_path / "a.fp16.st", "float16", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fp16.st"]
    found = load_file(tmp_path / "a.fp16.st")
    assert {name: x.shape for name, x in found.items()} == shapes
    assert {x.dtype for x in found.values()} == {np.dtype(np.float16)}
    inputs = 32 * 3 * 3
    assert np.std(found["a.weight"].astype(float)) == pytest.approx(inputs**-0.5, rel=0.05)
    assert np.mean(found["norm.weight"].astype(float)) == pytest.approx(1, abs=0.05)
    assert np.mean(found["a.bias"].astype(float)) == pytest.approx(0, abs=0.05)


def test_a_tokenizer_has_as_many_tokens_as_clip(tmp_path):
    miniature_tokenizer.write_tokenizer(tmp_path, "CLIPTokenizer", "!", length=77)
    folders._write_clip_tokenizer(tmp_path)
    found = tokenizers.load_tokenizer(tmp_path)
    assert sorted(found.get_vocab().values()) == list(range(49408))
    assert found.model_max_length == 77
    ids = found(["a red circle"], padding="max_length", max_length=77).input_ids[0]
    assert ids[0] == 49406 and 49407 in ids and ids[-1] == found.get_vocab()["!"]


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_windows_of_a_command_have_their_own_peaks(tmp_path):
    first, go = tmp_path / "first", tmp_path / "go"
    code = f"""
import pathlib, time
x = b"1" * 2**28
pathlib.Path({str(first)!r}).touch()
del x
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.01)
time.sleep(0.3)
"""

    def ended():
        if first.exists():
            go.touch()
        return first.exists()

    found = watch(python(code), tmp_path / "log", [Window("large", ended), Window("small", never)])
    assert found["large"]["peak_bytes"] > 2**28 > found["small"]["peak_bytes"] > 2**20
    assert 0.2 < found["small"]["seconds"] < 10


def test_a_command_is_killed_when_its_last_window_is_over(tmp_path):
    code = f"import time; open({str(tmp_path / 'there')!r}, 'w'); time.sleep(100)"
    windows = [Window("one", (tmp_path / "there").exists)]
    assert watch(python(code), tmp_path / "log", windows, kill=True).keys() == {"one"}
    killed = "import os; os.kill(os.getpid(), 9)"  # as a machine out of memory does
    for code, status in (("pass", 0), (killed, -9)):  # too early
        with pytest.raises(InputError, match=f"ended with status {status}"):
            watch(python(code), tmp_path / "log", [Window("one", never)], kill=True)


def test_the_end_of_the_output_of_a_command_that_fails_is_shown(tmp_path):
    with pytest.raises(InputError, match=r"status 3 .*: the reason"):
        watch(
            python("print('the reason'); raise SystemExit(3)"),
            tmp_path / "log",
            [Window("one", never)],
        )


def test_the_report_says_what_was_not_done(tmp_path):
    at = Places(tmp_path / "sd15")
    setting.write(at.folder, Setting("sd15", size=64, batch=1, rewards=["clip_score"]))
    assert setting.read(at.folder).rewards == ["clip_score"]
    window = {"seconds": 1234.5, "peak_bytes": 3 * 2**30}
    counts = {"unet": 860_000_000, "hps_v2_1": 2**30, "image_reward": 0, "clip_score": 5}
    made = {"parameters": counts, "disk_bytes": 3e9, "pixels": [64, 64]}
    (at.folder / "make.json").write_text(json.dumps(made | {"windows": {"write": window}}))
    found = report.text(tmp_path)
    assert "| `benchmarks.fullsize`: write | 1,234 | 3.0 |" in found
    assert "64 x 64 px, 3 steps of one image;" in found and "Left out are hps_v2_1" in found
    assert "2.0 GiB in bfloat16" in found and "unet 860 M" in found
    assert "Not done yet: forward, plan, train, resume, sample" in found
    assert "--family=sd15 --size=64 --batch=1 --rewards=clip_score" in found
    assert "- SDXL: `make fullsize FLAGS=--family=sdxl`" in found


def test_other_images_are_far():
    found = {"differences": {"diffusers": 1.0, "untrained": 90.0, "peft": 2.0, "kohya": 3.0}}
    assert phases.far(found) == ["kohya"]
