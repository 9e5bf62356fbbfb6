"""Exports of SDXL, SD3 and Taiyi runs: stock diffusers draws what we draw."""

import functools
import json
import re
import shutil

import diffusers
import numpy as np
import pytest
from runs import CLOSE, RANK, card, difference, images_of, ours, silent, write_run
from safetensors import safe_open
from safetensors.numpy import load_file

from r0_jax import sample
from r0_jax.export import comfyui
from r0_jax.export import folder as export
from r0_jax.stand_ins import miniature
from r0_jax.weights import convert
from r0_jax.workdir import checkpoint
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import LocalWorkdir

# Importing them says that torchvision is not there.
STOCK = {
    kind.__name__: kind
    for kind in (
        diffusers.StableDiffusionPipeline,
        diffusers.StableDiffusionXLPipeline,
        diffusers.StableDiffusion3Pipeline,
        diffusers.ZImagePipeline,
    )
}
T5 = ("text_encoder_3", "tokenizer_3")
FAMILIES = {  # name -> (miniature, targets, parts left out)
    "sdxl": (
        "StableDiffusionXLPipeline",
        r".*\.attn[12]\.to_(q|v|out\.0)|add_embedding\.linear_1",
        (),
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|pos_embed\.proj",
        (),
    ),
    "sd3_without_t5": ("StableDiffusion3Pipeline", r".*\.attn\.to_q", T5),
    "taiyi": ("Taiyi", r".*\.attn[12]\.to_(q|v|out\.0)", ()),
    "z_image": (
        "ZImagePipeline",
        r".*\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
        (),
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Of every family a folder, a run of adapters and one of all weights, and their exports."""
    root = tmp_path_factory.mktemp("families")
    for name, (family, targets, absent) in FAMILIES.items():
        here = root / name
        miniature.write(here / "base", family, **dict.fromkeys(absent))
        size = 16 if name == "z_image" else 0
        write_run(here / "lora", here / "base", RANK, {10: 0.5}, targets, size)
        export.export(
            LocalWorkdir(here / "lora"), here / "peft", "peft", base_model=str(here / "base")
        )
        export.export(LocalWorkdir(here / "lora"), here / "merged", "diffusers")
        if name != "taiyi":  # a UNet as SDXL's
            write_run(here / "full", here / "base", 0, {10: None}, targets, size)
            export.export(LocalWorkdir(here / "full"), here / "diffusers", "diffusers")
    return root


def stock(folder, absent=()):
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    pipeline = STOCK[index["_class_name"]].from_pretrained(folder, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(source):
    return np.random.default_rng(0).standard_normal((3, *source.pipeline.latent_shape), np.float32)


@functools.cache  # compiled once a family
def adapted(folder):
    """A run of adapters, noise for it and our images from that noise."""
    source = sample.from_run(LocalWorkdir(folder / "lora"))
    noise = noise_of(source)
    return source, noise, ours(source, noise)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd3_without_t5", "z_image"])
def test_a_whole_folder_draws_what_the_run_draws(world, name):
    folder, absent = world / name, FAMILIES[name][2]
    source = sample.from_run(LocalWorkdir(folder / "full"))
    noise = noise_of(source)
    with silent():
        pipeline = stock(folder / "diffusers", absent)
        theirs = images_of(pipeline, noise=noise)
    assert theirs.std() > 0.05 and np.mean((theirs == 0) | (theirs == 1)) < 0.7
    assert difference(theirs, ours(source, noise)) < CLOSE
    base = stock(folder / "base", absent)
    base.scheduler = pipeline.scheduler
    assert difference(theirs, images_of(base, noise=noise)) > 20 * CLOSE  # what was trained
    if name == "sd3":  # nobody trains sines and cosines
        weights, before = (
            load_file(folder / at / "transformer" / "diffusion_pytorch_model.safetensors")
            for at in ("diffusers", "base")
        )
        key = "pos_embed.pos_embed"
        np.testing.assert_array_equal(weights[key], before[key])
        assert key not in open_run(LocalWorkdir(folder / "full")).params(10)


@pytest.mark.parametrize(
    "name, kind",
    [("sdxl", diffusers.UNet2DConditionModel), ("sd3", diffusers.SD3Transformer2DModel)],
)
def test_what_is_large_is_read_and_written_in_parts(world, name, kind, tmp_path, monkeypatch):
    """Shards with an index, as diffusers writes them; each group of a checkpoint is read twice,
    once to be checked, so their order is that of the file that is written."""
    calls = []

    def read(folder, targets):
        calls.append(sorted(targets))
        return read_group(folder, targets)

    read_group = checkpoint.read_arrays
    monkeypatch.setattr(checkpoint, "read_arrays", read)
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 20_000)
    monkeypatch.setattr(convert, "MAX_SHARD_SIZE", 30_000)
    export.export(LocalWorkdir(world / name / "full"), tmp_path / "out", "diffusers")
    groups = calls[: len(calls) // 2]
    assert calls == 2 * groups and len(groups) > 3
    part = "transformer" if name == "sd3" else "unet"
    files = sorted(path.name for path in (tmp_path / "out" / part).glob("*.safetensors"))
    stem = "diffusion_pytorch_model"
    assert (
        files
        == [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        and len(files) > 3
    )
    with silent():
        ours = kind.from_pretrained(tmp_path / "out" / part).state_dict()
    expected = load_file(world / name / "diffusers" / part / f"{stem}.safetensors")
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    kind.from_pretrained(tmp_path / "out" / part).save_pretrained(
        tmp_path / "theirs", max_shard_size=30_000
    )
    index, theirs = (
        json.loads((folder / f"{stem}.safetensors.index.json").read_text("utf-8"))
        for folder in (tmp_path / "out" / part, tmp_path / "theirs")
    )
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert index.keys() == theirs.keys() and len(index["weight_map"]) == len(theirs["weight_map"])


@pytest.mark.parametrize("name", ["sdxl", "sd3", "taiyi", "z_image"])
def test_adapters_at_scale_one(world, name):
    folder = world / name
    source, noise, expected = adapted(folder)
    with silent():
        pipeline = stock(folder / "base")
        scheduler = json.loads((folder / "peft" / "scheduler_config.json").read_text("utf-8"))
        kind = getattr(diffusers, scheduler["_class_name"])
        pipeline.scheduler = kind.from_pretrained(folder / "peft")
        before = images_of(pipeline, noise=noise)
        pipeline.load_lora_weights(folder / "peft")
        found = images_of(pipeline, noise=noise)
    assert difference(found, expected) < CLOSE
    assert difference(found, before) > 20 * CLOSE

    # Every tensor of the file is where it belongs, and nowhere is there another.
    part = source.pipeline.generator_part
    tensors = load_file(folder / "peft" / export.LORA_FILE)
    state = getattr(pipeline, part).state_dict()
    assert len(tensors) == sum("lora" in key for key in state) >= 12
    for key, value in tensors.items():
        module, factor, _ = key.removeprefix(f"{part}.").rsplit(".", 2)
        np.testing.assert_array_equal(state[f"{module}.{factor}.default_0.weight"], value)
    with safe_open(folder / "peft" / export.LORA_FILE, "numpy") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert adapter[f"{part}.r"] == RANK


@pytest.mark.parametrize("name", ["sdxl", "sd3", "taiyi", "z_image"])
def test_merged_adapters_draw_what_the_run_draws(world, name):
    folder = world / name
    source, noise, expected = adapted(folder)
    part = source.pipeline.generator_part
    with silent():
        pipeline = stock(folder / "merged")
        theirs = images_of(pipeline, noise=noise)
        kind = type(getattr(pipeline, part))
        _, info = kind.from_pretrained(folder / "merged" / part, output_loading_info=True)
        base = stock(folder / "base")
    assert not any(info.values())  # no key is missing, unused or mis-shaped
    print(f"{name}: stock diffusers against ours {difference(theirs, expected):.1e}")
    assert theirs.std() > 0.05 and np.mean((theirs == 0) | (theirs == 1)) < 0.7
    assert difference(theirs, expected) < CLOSE
    base.scheduler = pipeline.scheduler
    assert difference(theirs, images_of(base, noise=noise)) > 20 * CLOSE  # the adapters are there


@pytest.mark.parametrize(
    "name, form", [("sd3_without_t5", "peft"), ("sd3_without_t5", "diffusers"), ("sdxl", "peft")]
)
def test_the_snippet_of_the_card_runs(world, name, form, monkeypatch, tmp_path):
    folder = shutil.copytree(world / name / form, tmp_path / form)
    _, snippet, text = card(folder)
    assert ("text_encoder_3=None, tokenizer_3=None" in snippet) == (name != "sdxl")
    assert ("`sigmas=[1, 0.75, 0.5, 0.25]`" in text) == ("(shift 3)" in text) == (name != "sdxl")
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (folder / "image.png").exists()


def test_an_export_of_z_image_keeps_its_scheduler_and_says_what_no_guidance_is(
    world, monkeypatch, tmp_path
):
    folder = shutil.copytree(world / "z_image" / "peft", tmp_path / "peft")
    fields = json.loads((folder / "scheduler_config.json").read_text("utf-8"))
    assert fields["shift"] == 3 and "shift_terminal" not in fields
    _, snippet, text = card(folder)
    assert "num_inference_steps=4, guidance_scale=0, height=16, width=16)" in snippet
    assert "`sigmas=[1, 0.75, 0.5, 0.25]`" in text and "no guidance here" in text
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (folder / "image.png").exists()


def test_comfyui_knows_every_adapter_of_z_image(world):
    """Its map of names takes those of diffusers, q, k and v as slices of its fused layer."""
    block = r"(layers|noise_refiner|context_refiner)\.\d+"
    layer = r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"
    keys = load_file(world / "z_image" / "peft" / export.LORA_FILE).keys()
    assert all(
        re.fullmatch(rf"transformer\.{block}\.{layer}\.lora_[AB]\.weight", key) for key in keys
    )
    assert len(keys) == 2 * 7 * 4  # of two layers and two refiners


def test_an_export_without_t5_says_so(world, tmp_path):
    """Also where the index names a T5 that was never downloaded."""
    for source in ("index", "folder"):
        base = tmp_path / source
        if source == "index":
            shutil.copytree(world / "sd3_without_t5" / "base", base)
        else:
            shutil.copytree(world / "sd3" / "base", base)
            shutil.rmtree(base / "text_encoder_3")
        with (
            pytest.warns(UserWarning, match="loading without it")
            if source == "folder"
            else (silent())
        ):
            export.export(
                LocalWorkdir(world / "sd3_without_t5" / "lora"),
                tmp_path / f"{source}_out",
                "diffusers",
                pretrained=str(base),
            )
        index = json.loads((tmp_path / f"{source}_out" / "model_index.json").read_text("utf-8"))
        assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
        assert not (tmp_path / f"{source}_out" / "tokenizer_3").exists()


def test_a_run_of_another_size_is_drawn_and_described_so(world, tmp_path):
    workdir = shutil.copytree(world / "sdxl" / "lora", tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    config |= {"height": 24, "width": 16}
    (workdir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = sample.from_run(LocalWorkdir(workdir))
    assert source.pipeline.image_shape == (24, 16, 3)
    export.export(LocalWorkdir(workdir), tmp_path / "out", "diffusers")
    assert "guidance_scale=1, height=24, width=16)" in card(tmp_path / "out")[1]
    with silent():
        theirs = images_of(stock(tmp_path / "out"), noise=noise_of(source), height=24, width=16)
    assert difference(theirs, ours(source, noise_of(source))) < CLOSE


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z_image"])
def test_a_run_of_many_guided_steps_is_drawn_and_described_so(world, tmp_path, name):
    workdir = shutil.copytree(world / name / "lora", tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    config["sampler"] |= {"num_steps": 9, "guidance_scale": 3.5}
    (workdir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = sample.from_run(LocalWorkdir(workdir))
    assert len(source.scheduler.timesteps) == 9
    export.export(LocalWorkdir(workdir), tmp_path / "out", "diffusers")
    _, snippet, text = card(tmp_path / "out")
    assert "takes 9 steps with guidance 3.5, made from" in text
    stocks = 2.5 if name == "z_image" else 3.5
    assert f"num_inference_steps=9, guidance_scale={stocks:g}" in snippet
    nodes = json.loads((tmp_path / "out" / comfyui.FILE).read_text("utf-8"))["nodes"]
    assert any(3.5 in node.get("widgets_values", []) for node in nodes)
    noise = noise_of(source)
    with silent():
        theirs = images_of(stock(tmp_path / "out"), 9, noise, 3.5)
    drawn = ours(source, noise)
    print(f"{name}: stock diffusers against ours {difference(theirs, drawn):.1e}")
    assert difference(theirs, drawn) < CLOSE
    assert difference(ours(source._replace(guidance_scale=1.0), noise), drawn) > 5 * CLOSE
