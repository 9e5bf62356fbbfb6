"""What is exported is loaded by stock diffusers, which draws what we draw."""

import filecmp
import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from runs import (
    ALPHA,
    CLOSE,
    RANK,
    ROOT,
    card,
    check_refusals,
    commands,
    difference,
    images_of,
    ours,
    silent,
    write_run,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from r0_jax import sample
from r0_jax.errors import InputError
from r0_jax.export import comfyui
from r0_jax.export import folder as export
from r0_jax.method import lora
from r0_jax.pipelines import families, stable_diffusion
from r0_jax.weights import convert, lazy
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import LocalWorkdir

# --- tiny folders ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def runs(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "lora", pretrained, RANK, {10: 0.5, 20: 0.25})
    write_run(folder / "full", pretrained, 0, {20: None})
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export.export(LocalWorkdir(runs / "lora"), folder / "lora", "diffusers")
    export.export(LocalWorkdir(runs / "full"), folder / "full", "diffusers")
    export.export(LocalWorkdir(runs / "lora"), folder / "peft", "peft")
    return folder


# --- the two sides -----------------------------------------------------------------------


def stock(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- tests -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "full"])
def test_stock_diffusers_draws_what_the_run_draws(runs, exported, pretrained, name):
    with silent():
        pipeline = stock(exported / name)
        theirs = images_of(pipeline)
    trained = ours(sample.from_run(LocalWorkdir(runs / name)))
    assert theirs.std() > 0.1 and np.mean((theirs == 0) | (theirs == 1)) < 0.5
    assert difference(theirs, trained) < CLOSE
    print(f"{name}: stock diffusers against ours {difference(theirs, trained):.1e}")
    scheduler = sample.from_pipeline(exported / name, 4).scheduler
    np.testing.assert_equal(
        vars(scheduler), vars(sample.from_run(LocalWorkdir(runs / name)).scheduler)
    )
    base = stock(pretrained)
    base.scheduler = pipeline.scheduler
    assert difference(theirs, images_of(base)) > 50 * CLOSE  # what was trained is there


def test_lora_at_scale_one_is_the_merged_generator(exported, pretrained):
    merged = stock(exported / "lora")
    with silent():
        pipeline = stock(pretrained)
        pipeline.scheduler = diffusers.DDIMScheduler.from_pretrained(exported / "peft")
        before = images_of(pipeline)
        pipeline.load_lora_weights(exported / "peft")
        adapted = images_of(pipeline)
    print(
        f"peft: against merged {difference(adapted, images_of(merged)):.2e}, "
        f"against base {difference(adapted, before):.2e}"
    )
    assert difference(adapted, images_of(merged)) < CLOSE
    assert difference(adapted, before) > 50 * CLOSE

    # Every tensor of the file is where it belongs, and nowhere is there another.
    tensors = load_file(exported / "peft" / export.LORA_FILE)
    state = pipeline.unet.state_dict()
    assert len(tensors) == sum("lora" in key for key in state) > 20
    for key, value in tensors.items():
        module, factor, _ = key.removeprefix("unet.").rsplit(".", 2)
        np.testing.assert_array_equal(state[f"{module}.{factor}.default_0.weight"], value)

    pipeline.fuse_lora(lora_scale=1.0)
    pipeline.unload_lora_weights()
    for key, value in merged.unet.state_dict().items():
        np.testing.assert_allclose(pipeline.unet.state_dict()[key], value, atol=2e-6, err_msg=key)


def test_lora_file_says_what_peft_needs(exported):
    with safe_open(exported / "peft" / export.LORA_FILE, "numpy") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", key) for key in file.keys())
    assert adapter["unet.r"] == adapter["unet.lora_alpha"] == RANK  # the scale is in B
    assert "time_embedding.linear_1" in adapter["unet.target_modules"]


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_scheduler_visits_the_trained_grid(runs, exported, name):
    folder = exported / name
    folder = folder if name == "peft" else folder / "scheduler"
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder)
    scheduler.set_timesteps(4)
    grid = sample.from_run(LocalWorkdir(runs / "lora")).scheduler
    assert scheduler.timesteps.tolist() == grid.timesteps.tolist() == [999, 749, 499, 249]
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].sqrt()
    np.testing.assert_allclose(alphas, grid.alphas, rtol=1e-6)
    assert scheduler.final_alpha_cumprod == 1 and grid.next_sigmas[-1] == 0


def test_other_parts_are_the_same_bytes(exported, pretrained):
    copied = exported / "lora"
    for part in ("vae", "text_encoder", "tokenizer"):
        assert not (compared := filecmp.dircmp(pretrained / part, copied / part)).diff_files
        assert not compared.left_only + compared.right_only and compared.same_files
    assert filecmp.cmp(pretrained / "unet" / "config.json", copied / "unet" / "config.json")
    assert set(os.listdir(copied)) == {*os.listdir(pretrained), "README.md", comfyui.FILE}


def test_variants_shards_and_pickles_of_other_parts(runs, exported, pretrained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    vae, text = source / "vae", source / "text_encoder"
    os.replace(
        vae / "diffusion_pytorch_model.safetensors",
        vae / "diffusion_pytorch_model.fp16.safetensors",
    )
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    tensors = list(load_file(text / "model.safetensors").items())
    os.unlink(text / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(tensors[::2]), dict(tensors[1::2])]
    for name, half in zip(names, halves, strict=True):
        save_file(half, text / name, metadata={"format": "pt"})
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (text / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    path = source / "model_index.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "config.json").write_text("{}", encoding="utf-8")
    (source / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "LICENSE.md").write_text("be kind", encoding="utf-8")

    out = tmp_path / "out"
    export.export(LocalWorkdir(runs / "lora"), out, "diffusers", pretrained=str(source))
    assert not [*out.rglob("*.bin"), *(out / "safety_checker").glob("*")]
    assert (out / "LICENSE.md").read_text("utf-8") == "be kind"
    assert difference(images_of(stock(out)), images_of(stock(exported / "lora"))) == 0


def test_shards_of_any_name(pretrained, tmp_path):
    """Only the index says that they are weights."""
    source, target = tmp_path / "source" / "part", tmp_path / "target" / "part"
    shutil.copytree(pretrained / "text_encoder", source)
    target.parent.mkdir()
    tensors = list(load_file(source / "model.safetensors").items())
    os.unlink(source / "model.safetensors")
    weights = {}
    for name, half in [("model_a.safetensors", tensors[::2]), ("b.safetensors", tensors[1::2])]:
        save_file(dict(half), source / name, metadata={"format": "pt"})
        weights |= {key: name for key, _ in half}
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (source / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (source / "notes.txt").mkdir()  # a folder is passed over
    assert export._copy_part(source.parent, target.parent, "part")
    assert set(os.listdir(target)) == set(os.listdir(source)) - {"notes.txt"}
    network = stable_diffusion.load(pretrained).networks["text_encoder"]
    expected = convert.load([pretrained / "text_encoder" / "model.safetensors"], network)
    found = convert.load(convert.find_files(target, "model"), network)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    _, info = transformers.CLIPTextModel.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]


def test_an_old_sample_size_is_written_as_it_was_trained(runs, pretrained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    path = source / "unet" / "config.json"
    fields = json.loads(path.read_text("utf-8")) | {"_diffusers_version": "0.6.0"}
    path.write_text(json.dumps(fields), encoding="utf-8")
    (source / "LICENSES").mkdir()  # a folder is passed over
    with pytest.warns(UserWarning, match="sample_size 8: 64 is used"):
        export.export(
            LocalWorkdir(runs / "lora"), tmp_path / "out", "diffusers", pretrained=str(source)
        )
    written = json.loads((tmp_path / "out" / "unet" / "config.json").read_text("utf-8"))
    assert written == fields | {"sample_size": 64}
    assert not (tmp_path / "out" / "LICENSES").exists()


def test_which_parameters_and_dtype(runs, tmp_path):
    opened = open_run(LocalWorkdir(runs / "lora"))
    base = lazy.place(opened.pipeline.params["unet"])
    seen = []
    for step, ema, dtype in [
        ("", True, "float32"),
        ("latest", True, "float32"),
        ("10", False, "float16"),
        ("best", True, "bfloat16"),
    ]:
        out = tmp_path / f"{len(seen)}"
        chosen = export.export(
            LocalWorkdir(runs / "lora"), out, "diffusers", step=step, ema=ema, dtype=dtype
        )
        adapters = jax.tree.map(jnp.asarray, opened.params(chosen, ema))
        merged = jax.device_get(lora.merge(base, adapters, ALPHA / RANK))
        network = opened.pipeline.networks["unet"]
        file = out / "unet" / "diffusion_pytorch_model.safetensors"
        for name, value in convert.load([file], network).items():
            expected = merged[name].astype(convert.DTYPES[dtype]).astype(np.float32)
            np.testing.assert_array_equal(value, expected, err_msg=name)
        with safe_open(file, "numpy") as tensors:
            names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
            assert tensors.get_slice("conv_in.weight").get_dtype() == names[dtype]
        assert f", dtype=torch.{dtype})" in card(out)[1]
        seen.append(chosen)
    assert seen == [10, 20, 10, 10]  # step 10 has the better held-out score
    assert open_run(LocalWorkdir(runs / "full")).choose_step() == 20  # none was measured


def test_a_run_is_read_once(runs, tmp_path, monkeypatch):
    run, read, read_text = runs / "lora", [], Path.read_text

    def noted(path, *args, **options):
        read.append(path)
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", noted)
    export.export(LocalWorkdir(run), tmp_path / "out", "peft", step="20")
    assert read.count(run / "config.json") == 1
    assert read.count(run / "checkpoints" / "20" / "metrics" / "metrics") == 1


def test_what_is_quick_to_see_is_said_before_the_pipeline_is_read(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "load", lambda *args, **options: pytest.fail("it was read"))
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        export.export(LocalWorkdir(runs / "lora"), tmp_path / "out", "diffusers", step="7")
    with pytest.raises(InputError, match="no adapters to write"):
        export.export(LocalWorkdir(runs / "full"), tmp_path / "out", "kohya")
    with pytest.raises(pytest.fail.Exception, match="it was read"):
        export.export(LocalWorkdir(runs / "lora"), tmp_path / "out", "diffusers")


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({0: 0.5, 20: None}, 20),  # stopped before the first evaluation: not the base again
        ({0: 0.5, 10: 0.25, 20: None}, 0),
        ({0: 0.1, 10: 0.5, 20: 0.4}, 10),
        ({0: 0.5}, 0),
    ],
)
def test_the_step_that_is_taken_by_default(pretrained, tmp_path, scores, chosen):
    write_run(tmp_path / "run", pretrained, RANK, scores)
    assert open_run(LocalWorkdir(tmp_path / "run")).choose_step() == chosen


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_the_card_and_its_snippet(runs, pretrained, tmp_path, name, monkeypatch):
    evaluation = {
        "models": {"r0_4": {"judge_accuracy": {"value": 0.9, "ci95": [0.88, 0.92]}}},
        "prompts": 300,
        "checkpoint": "step 20",
    }
    workdir = tmp_path / "run"
    shutil.copytree(runs / "lora", workdir)
    (workdir / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    write_examples(workdir, ["a `red` circle", "红色的圆"])
    form = "peft" if name == "peft" else "diffusers"
    export.export(LocalWorkdir(workdir), tmp_path / "out", form, base_model=str(pretrained))
    front, snippet, text = card(tmp_path / "out")
    assert front["base_model"] == str(pretrained) and front["library_name"] == "diffusers"
    assert front["base_model_relation"] == ("adapter" if name == "peft" else "finetune")
    assert front["pipeline_tag"] == "text-to-image"
    assert ("lora" in front["tags"]) == (name == "peft")
    for line in [
        "| rewards | clip x 0.5, hps x 1 |",
        "| held-out rewards | pickscore |",
        "| regularizers | weight x 0.01 |",
        "| images per step | 8 |",
        "| weights | step 10 of 100, EMA |",
        "| heldout/pickscore at this step | 0.5 |",
        "The run's last evaluation (300 prompts, step 20)",
        "| judge accuracy ↑ | 0.900 ± 0.020 |",
    ]:
        assert line in text
    assert ("The scale of the LoRA is 1" in text) == (name == "peft")
    assert "timesteps 999, 749, 499, 249" in text and 'timestep_spacing="trailing"' in text

    # The best checkpoint is step 10: images of another one do not show what it draws.
    assert "widget" not in front and not (tmp_path / "out" / "images").exists()
    (workdir / "eval.json").write_text(json.dumps(evaluation | {"checkpoint": "step 10"}))
    export.export(LocalWorkdir(workdir), tmp_path / "shown", form, base_model=str(pretrained))
    front, _, text = card(tmp_path / "shown")
    assert front["widget"] == [
        {"text": "a `red` circle", "output": {"url": "images/0.png"}},
        {"text": "红色的圆", "output": {"url": "images/1.png"}},
    ]
    assert (tmp_path / "shown" / "images" / "1.png").read_bytes() == b"image 1"
    assert r"| ![a \`red\` circle](images/0.png) | ![红色的圆](images/1.png) |" in text
    export.export(LocalWorkdir(workdir), tmp_path / "raw", form, ema=False)
    assert "widget" not in card(tmp_path / "raw")[0]

    monkeypatch.chdir(tmp_path / "out")
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "out" / "image.png").exists()


def write_examples(workdir, prompts):
    """What an evaluation leaves, with bytes for images."""
    folder = workdir / "samples" / "eval" / "r0_4"
    folder.mkdir(parents=True)
    lines = []
    for i, prompt in enumerate(prompts):
        (folder / f"{i:04d}.png").write_bytes(f"image {i}".encode())
        lines.append(json.dumps({"prompt": prompt, "files": {"r0_4": f"r0_4/{i:04d}.png"}}))
    (folder.parent / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_the_card_without_an_evaluation_names_the_base_as_others_know_it(runs, exported, tmp_path):
    front, _, text = card(exported / "lora")
    assert front["base_model"] == "base" and "Measured" not in text and str(runs) not in text
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    config = json.loads((runs / "full" / "config.json").read_text("utf-8"))
    shutil.copytree(config["pretrained"], cached)
    workdir = tmp_path / "run"
    shutil.copytree(runs / "full", workdir)
    config["pretrained"] = str(cached)
    (workdir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export.export(LocalWorkdir(workdir), tmp_path / "out", "diffusers")
    front, _, text = card(tmp_path / "out")
    assert front["base_model"] == "owner/name"
    assert "| trained | all weights |" in text and "step 20 of 100" in text


def test_an_export_replaces_only_an_export(runs, exported, pretrained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(exported / "lora", out)
    with pytest.raises(InputError, match="exists already; choose another --out, or replace"):
        export.export(LocalWorkdir(runs / "lora"), out, "peft")
    export.export(LocalWorkdir(runs / "lora"), out, "peft", overwrite=True)
    assert set(os.listdir(out)) == {"README.md", export.LORA_FILE, "scheduler_config.json"}
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "README.md").write_text("my thesis", encoding="utf-8")
    with pytest.raises(InputError, match="not an earlier export, so --overwrite does not delete"):
        export.export(LocalWorkdir(runs / "lora"), precious, "peft", overwrite=True)
    shutil.copy(ROOT / "README.md", precious)  # which tells how to export
    with pytest.raises(InputError, match="not an earlier export, so --overwrite does not delete"):
        export.export(LocalWorkdir(runs / "lora"), precious, "peft", overwrite=True)
    assert set(os.listdir(tmp_path)) == {"out", "precious"}
    # An earlier export may be what this run was trained on.
    again = tmp_path / "again"
    shutil.copytree(exported / "lora", again)
    with pytest.raises(InputError, match=", an input; choose"):
        export.export(
            LocalWorkdir(runs / "lora"), again, "peft", overwrite=True, pretrained=str(again)
        )


def test_nothing_is_left_of_an_export_that_failed(runs, exported, tmp_path, monkeypatch):
    shutil.copytree(exported / "peft", tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.convert, "save_shards", fail)
    with pytest.raises(InputError, match=r"cannot write .*out: no space left"):
        export.export(LocalWorkdir(runs / "lora"), tmp_path / "out", "diffusers", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "README.md").read_bytes() == before


def test_names_and_links_that_lead_out_are_not_followed(pretrained, tmp_path):
    base, secret = tmp_path / "base", tmp_path / "secret"
    shutil.copytree(pretrained, base)
    write_run(tmp_path / "run", base, RANK, {10: None})
    secret.mkdir()
    (secret / "token.txt").write_text("hunter2", "utf-8")

    def fails(match):
        with pytest.raises(InputError, match=match):
            export.export(LocalWorkdir(tmp_path / "run"), tmp_path / "out" / "new", "diffusers")
        assert not list((tmp_path / "out").glob("*")) and len(list(secret.iterdir())) == 1

    index = json.loads((base / "model_index.json").read_text("utf-8"))
    for name in ["../secret", str(secret), "..", "a/b", "a\\b", "", "a\0b"]:
        changed = json.dumps(index | {name: ["diffusers", "AutoencoderKL"]})
        (base / "model_index.json").write_text(changed, "utf-8")
        fails(r"model_index.json: .* is not the name of a folder")
    (base / "model_index.json").write_text(json.dumps(index), "utf-8")
    for link, target in [
        (base / "tokenizer" / "added.json", secret / "token.txt"),
        (base / "LICENSE.txt", Path("..", "secret", "token.txt")),
    ]:
        link.symlink_to(target)
        fails(rf"{link.name} is a link that leads out of")
        link.unlink()
    (base / "LICENSE").symlink_to("tokenizer/vocab.json")  # stays inside
    export.export(LocalWorkdir(tmp_path / "run"), tmp_path / "out" / "new", "diffusers")
    assert filecmp.cmp(tmp_path / "out/new/LICENSE", base / "tokenizer/vocab.json", shallow=False)


# --- the command -------------------------------------------------------------------------


def test_the_command_needs_no_torch(runs, exported, tmp_path):
    calls = [
        ["--workdir", runs / "lora", "--out", tmp_path / "a", "--format=diffusers"],
        ["--workdir", runs / "lora", "--out", tmp_path / "b", "--format=peft", "--noema"],
    ]
    results = commands("r0_jax.export", calls)
    assert [(status, err) for status, _, err in results] == [(0, "")] * 2, results
    assert results[0][1] == f"step 10 of {runs / 'lora'} is in {tmp_path / 'a'} (diffusers)\n"
    for file in ("README.md", "unet/diffusion_pytorch_model.safetensors"):
        assert filecmp.cmp(tmp_path / "a" / file, exported / "lora" / file, shallow=False)
    ema = load_file(exported / "peft" / export.LORA_FILE)
    raw = load_file(tmp_path / "b" / export.LORA_FILE)
    assert ema.keys() == raw.keys() and not any(np.array_equal(ema[k], raw[k]) for k in ema)


def test_bad_input_is_one_line(runs, pretrained, tmp_path):
    def broken(name, change):
        shutil.copytree(runs / "lora", tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text("utf-8"))
        change(config)
        path.write_text(json.dumps(config), encoding="utf-8")
        return ["--workdir", tmp_path / name, "--out", tmp_path / "out", "--format=diffusers"]

    moved = broken("moved", lambda config: config.update(pretrained="gone/away"))
    narrow = broken("narrow", lambda config: config["lora"].update(targets=r".*\.to_q"))
    foreign = broken("foreign", lambda config: config.pop("lora"))
    typed = broken("typed", lambda config: config["sampler"].update(num_steps="4"))
    folderless = broken("folderless", lambda config: config.update(pretrained=5))
    no_json = broken("no_json", dict)
    (tmp_path / "no_json" / "config.json").write_text("{", encoding="utf-8")
    listed, number, deep = (broken(name, dict) for name in ("listed", "number", "deep"))
    for name, text in [("listed", "[1]"), ("number", "3"), ("deep", "[" * 100_000)]:
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")
    (tmp_path / "empty" / "config.json").mkdir(parents=True)
    young = broken("young", dict)
    shutil.rmtree(tmp_path / "young" / "checkpoints")
    cut = broken("cut", dict)
    (tmp_path / "cut" / "eval.json").write_text('{"models": {', encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine", encoding="utf-8")
    good = ["--workdir", runs / "lora", "--format=peft"]
    to = ["--out", tmp_path / "out"]

    check_refusals(
        "r0_jax.export",
        [
            (["--workdir=w", "--out=o"], "missing --format=... "),
            (["--workdir=w", "--out=o", "--format=onnx"], "diffusers"),
            (
                ["--workdir", tmp_path / "none", *to, "--format=peft"],
                "none is not a folder; give the",
            ),
            (["--workdir", tmp_path / "empty", *to, "--format=peft"], "has no config.json"),
            (no_json, "config.json is not the config of a run"),
            (listed, "config.json is not the config of a run"),
            (number, "config.json is not the config of a run"),
            (deep, "config.json is not the config of a run"),
            (foreign, "config.json has no lora.rank"),
            (typed, "sampler.num_steps = '4' is not the config of an R0 run"),
            (folderless, "pretrained = 5 is not the config of an R0 run"),
            (young, "young has no checkpoint yet"),
            (
                moved,
                "gone/away, the pretrained .* not there; say where it is now with --pretrained",
            ),
            ([*moved, "--pretrained", tmp_path / "empty"], "model_index.json is missing"),
            (narrow, "trained on another pipeline than .*absent"),
            (cut, "eval.json is not readable JSON"),
            ([*good, *to, "--step=7"], r"has no checkpoint of step 7; it has \[10, 20\]"),
            (
                [*good, *to, "--step=last"],
                "--step=last: expected the number of a step, best or latest",
            ),
            (["--workdir", runs / "full", *to, "--format=diffusers", "--step=best"], "held-out"),
            (["--workdir", runs / "full", *to, "--format=peft"], "use --format=diffusers"),
            ([*good, "--out", tmp_path / "full"], "full exists already"),
            ([*good, "--out", tmp_path / "full" / "note.txt" / "x"], "note.txt: not a directory; "),
            (["limit=2000", *good, *to], "cannot be written .*is the disk full"),
        ],
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
