"""The command that makes a table: what it refuses before it measures, and what it passes on."""

import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
import tiny
import torch
from runs import check_refusals, commands, write_run
from transformers import Dinov2Config, Dinov2Model

from r0_jax import compilation_cache, evaluate, rewards
from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.evaluation import images, world
from r0_jax.files import check_writable
from r0_jax.workdir import run

TINY_DINOV2 = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained pipeline, and a run of it whose config has a test."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.stable_diffusion(folder / "base")
    write_run(folder / "run", folder / "base", 2, {10: 0.5})
    path = folder / "run" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["test"] = base.get_config().test.to_dict()
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_bad_input_is_one_line(folder, tmp_path):
    def changed(name, **fields):
        (tmp_path / name).mkdir()
        config = json.loads((folder / "run" / "config.json").read_text("utf-8")) | fields
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return ["--workdir", tmp_path / name, "--prompts=p.txt"]

    moved, foreign = changed("moved", pretrained="gone/away"), changed("foreign")
    shorter = base.get_config().test.to_dict()
    del shorter["features"]
    older = changed("older", test=shorter)
    config = json.loads((tmp_path / "foreign" / "config.json").read_text("utf-8"))
    del config["test"]
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    blocked = changed("blocked")
    (tmp_path / "blocked" / "samples").write_text("mine", encoding="utf-8")
    for name in ("table", "images/samples/eval"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "table" / "eval.json").write_text("{}", encoding="utf-8")
    pipeline = ["--pipeline", folder / "base", "--prompts=p.txt"]
    against = ["--against", folder / "base"]
    out = ["--out", tmp_path / "out"]
    (tmp_path / "two.txt").write_text("a\nb\n", encoding="utf-8")
    compared = [*pipeline[:2], *against, *out, "--prompts", tmp_path / "two.txt"]
    tiny.clip(tmp_path / "clip", seed=1)
    seen = ["--features", tmp_path / "clip"]

    check_refusals(
        "r0_jax.evaluate",
        [
            (["--seed=1"], "give either --workdir=W or --pipeline=DIR"),
            ([*pipeline, *out, "--workdir=w"], "give either --workdir=W or --pipeline=DIR"),
            ([*pipeline], "--pipeline needs --out=DIR"),
            ([*pipeline, *out, "--step=best"], "--step and --pretrained go with --workdir"),
            ([*pipeline, *out, "--pretrained=d"], "--step and --pretrained go with --workdir"),
            (["--workdir", folder / "run", *out], "--out and --overwrite go with --pipeline"),
            (["--workdir", folder / "run"], "no test.prompts: give --prompts=FILE"),
            ([*pipeline, "--out", tmp_path / "table"], "eval.json exists already; .* --overwrite"),
            (
                [*pipeline, "--out", tmp_path / "images"],
                "samples/eval exists already; .* --overwrite",
            ),
            ([*pipeline, "--out", tmp_path / "table", "--overwrite"], "p.txt: no such file"),
            ([*pipeline, "--out", tmp_path / "table" / "eval.json"], "eval.json is not a folder"),
            (blocked, "samples is not a folder"),
            (foreign, "config.json has no test, so it is not the config of an R0 run"),
            (older, "config.json has no test.features: it is of an older run"),
            (moved, "gone/away, the pretrained .* say where it is now with --pretrained=DIR"),
            (
                [
                    *("--workdir", folder / "run", "--prompts=p.txt"),
                    *("--pretrained", tmp_path / "table"),
                ],
                "model_index.json is missing",
            ),
            ([*moved, "--pretrained", folder / "base"], "moved has no checkpoint yet"),
            ([*compared, "--images", f"a/b={tmp_path}"], "the name is that of a file"),
            (
                [*foreign[:2], *out, *against, "--prompts", tmp_path / "two.txt"],
                "config.json has no test, so it is not the config of an R0 run",
            ),
            ([*compared, *2 * seen], "two of the folders measure frechet_clip"),
            (against, "--against compares with --workdir=W, --pipeline=DIR or --images"),
            ([*pipeline, *against], r"a comparison needs --out=\.\.\. \(see --help\)"),
            ([*pipeline, *against, "--out", tmp_path / "table"], "eval.json exists already; "),
            ([*pipeline, *against, *out], "p.txt: no such file"),
            ([*pipeline, *out, "--rewards=hps=/x"], "p.txt: no such file"),
            ([*pipeline, *out, "--seed=-1"], "--seed=-1"),
            ([*pipeline, *out, "--seed=4294967295"], "--seed=4294967295"),
            ([*pipeline, *out, "--num_inference_steps=0"], "--num_inference_steps=0"),
        ],
    )
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "table" / "eval.json").read_text("utf-8") == "{}"


def test_a_run_its_base_and_a_peer_side_by_side(folder, tmp_path):
    """The peer has the run's own images, so its numbers are those of the run."""
    tiny.clip(tmp_path / "clip", seed=1)
    prompts = ["a red square", "a blue circle", "a star"]
    (tmp_path / "p.csv").write_text("\n".join(["Prompt", *prompts]), "utf-8")
    peer, out = tmp_path / "peer", tmp_path / "out"

    def call(*flags):
        return [
            *("--workdir", folder / "run", "--prompts", tmp_path / "p.csv", "--column=Prompt"),
            *("--out", out, "--rewards", f"clip_score={tmp_path / 'clip'}", "--batch_size=3"),
            *("--samples_per_prompt=2", "--against_steps=1", "--against_guidance_scale=3"),
            *flags,
        ]

    [(status, said, err)] = commands("r0_jax.evaluate", [call()])
    assert (status, err) == (0, ""), said
    table = json.loads((out / "eval.json").read_text("utf-8"))
    assert list(table["models"]) == ["base_1_guided", "r0_4"]
    for name, calls in (("base_1_guided", 2), ("r0_4", 4)):
        entries = table["models"][name]
        assert entries["network_calls"]["value"] == calls
        assert entries["seconds_per_image"]["value"] > 0 and entries["diversity"]["value"] > 0
        assert len(list((out / "images" / name).glob("0*.png"))) == 6
    reward = rewards.load("clip_score", tmp_path / "clip")
    with np.load(out / "eval_values.npz") as arrays:
        for name in table["models"]:
            for i, prompt in enumerate(prompts):
                drawn = [
                    images.load_png(out / "images" / name / f"{i:05d}_{j}.png") for j in (0, 1)
                ]
                expected = np.mean(reward(np.stack(drawn), [prompt] * 2))
                found = arrays[f"{name}/reward/clip_score"][i]
                np.testing.assert_allclose(found, expected, atol=1e-4)

    shutil.copytree(out / "images" / "r0_4", peer)
    stamp = os.stat(out / "images/r0_4/00000_0.png").st_mtime_ns
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**TINY_DINOV2)).save_pretrained(tmp_path / "dinov2")
    more = ["--images", f"peer={peer}", "--reference", peer, "--overwrite"]
    more += [f"--features={tmp_path / name}" for name in ("clip", "dinov2")]
    [(status, said, err)] = commands("r0_jax.evaluate", [call(*more)])
    assert status == 0 and err.startswith("warning: published CMMD is of CLIP ViT-L/14 at 336")
    assert os.stat(out / "images/r0_4/00000_0.png").st_mtime_ns == stamp  # not drawn again
    table = json.loads((out / "eval.json").read_text("utf-8"))
    ours, theirs = table["models"]["r0_4"], table["models"]["peer"]
    for name in ("reward/clip_score", "sign/saturation", "diversity"):
        assert theirs[name]["value"] == pytest.approx(ours[name]["value"])
    assert abs(theirs["cmmd"]["value"]) < 1e-6 < table["models"]["base_1_guided"]["cmmd"]["value"]
    for name in ("frechet_clip", "frechet_dinov2"):
        assert theirs[name]["value"] < 1e-6 < theirs[f"{name}_floor"]["value"], name
        low, high = table["differences"]["peer"][name]["ci95"]
        assert low < theirs[name]["value"] - table["models"]["base_1_guided"][name]["value"] < high
    assert "seconds_per_image" not in theirs and "reward/clip_score" in table["differences"]["peer"]
    assert (out / "report.html").stat().st_size > 10_000


def test_where_results_can_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []  # it only looks
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link is not a folder"):
        check_writable(tmp_path / "link")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=f"a/b: {tmp_path} is not writable"):
        check_writable(tmp_path / "a" / "b")


def test_scenes_are_square():
    world.check_shape((96, 96, 3))
    with pytest.raises(InputError, match="images of 64 x 96 pixels"):
        world.check_shape((64, 96, 3))


def test_a_user_without_a_home_has_a_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        with pytest.warns(UserWarning, match="there is no home folder: the cache is in"):
            compilation_cache.keep()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_run_of_another_machine_is_measured_by_xla(folder, monkeypatch, capsys):
    """Its attention, which this machine has not; and its report is made anew."""
    seen, fields = (
        [],
        {
            "workdir": str(folder / "run"),
            "prompts": "p.txt",
            "num_prompts": None,
            "pretrained": None,
            "seed": None,
            "step": "",
            "pipeline": None,
            "out": None,
            "overwrite": False,
        },
    )
    compared = dict.fromkeys(("rewards", "against", "images"))
    config = run.read_config(folder / "run")
    config.attention = "cudnn"
    monkeypatch.setattr(evaluate.run, "read_config", lambda workdir: config)
    monkeypatch.setattr(evaluate.flags, "FLAGS", types.SimpleNamespace(**fields, **compared))
    monkeypatch.setattr(
        evaluate, "evaluate_run", lambda opened, step: seen.append(opened.config.attention)
    )
    monkeypatch.setattr(evaluate.result_table, "print_table", lambda table: None)
    monkeypatch.setattr(evaluate.report, "write_report", lambda folder: "anew")
    with pytest.warns(UserWarning, match="computed by 'xla': .*needs an NVIDIA GPU"):
        evaluate.main([])
    assert seen == ["xla"] and "report: anew" in capsys.readouterr().out
