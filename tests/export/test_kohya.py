"""Adapters in kohya's format: names, scale, metadata, and what stock diffusers makes of them."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.loaders import lora_conversion_utils
from runs import ALPHA, CLOSE, RANK, card, check_refusals, difference, silent, write_run
from safetensors import safe_open
from safetensors.numpy import load_file

from r0_jax.errors import InputError
from r0_jax.export import folder as export
from r0_jax.export import kohya
from r0_jax.stand_ins import miniature
from r0_jax.weights import convert
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import LocalWorkdir

KEYS = Path(__file__).parents[1] / "data" / "keys"
STOCK = {
    kind.__name__: kind
    for kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)
}
EVERY = r".*"  # linears and convolutions, within blocks and outside


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("kohya")
    tiny.stable_diffusion(root / "sd15" / "base")
    miniature.write(root / "sdxl" / "base", "StableDiffusionXLPipeline")
    for name in ("sd15", "sdxl"):
        here = root / name
        write_run(here / "run", here / "base", RANK, {10: 0.5}, EVERY)
        for form in ("peft", "kohya"):
            export.export(
                LocalWorkdir(here / "run"), here / form, form, base_model=str(here / "base")
            )
    return root


def stock(folder, form):
    """The base with the adapters of an export, as stock diffusers loads them."""
    index = json.loads((folder / "base" / "model_index.json").read_text("utf-8"))
    with silent():
        pipeline = STOCK[index["_class_name"]].from_pretrained(folder / "base")
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_pretrained(folder / form)
        pipeline.load_lora_weights(folder / form)
    return pipeline


def draw(pipeline):
    size = pipeline.unet.config.sample_size
    latents = torch.randn((2, 4, size, size), generator=torch.manual_seed(0))
    return pipeline(
        ["a red circle", "a star"],
        num_inference_steps=4,
        guidance_scale=1,
        latents=latents,
        output_type="np",
    ).images


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_stock_diffusers_loads_it_as_it_loads_peft(world, name):
    ours, theirs = stock(world / name, "kohya"), stock(world / name, "peft")
    with silent():
        images = draw(ours)
        assert difference(images, draw(theirs)) < CLOSE
    # Every tensor of the file is in its place.
    states = [pipeline.unet.state_dict() for pipeline in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    factors = [key for key in states[0] if ".lora_" in key]
    tensors = load_file(world / name / "kohya" / "kohya.safetensors")
    assert len(factors) == sum(key.endswith(".weight") for key in tensors) > 40
    assert any(states[0][key].ndim == 4 and states[0][key].shape[-1] == 3 for key in factors)
    for key in factors:
        scale = ALPHA / RANK if ".lora_B." in key else 1
        np.testing.assert_allclose(scale * states[0][key], states[1][key], rtol=1e-6, err_msg=key)
    ours.unload_lora_weights()
    assert difference(images, draw(ours)) > 10 * CLOSE
    # At scale 1, merged, they are the generator that was trained.
    run = open_run(LocalWorkdir(world / name / "run"))
    weights = run.merged_weights(run.params(10))
    theirs.fuse_lora(lora_scale=1.0)
    ours.load_lora_weights(world / name / "kohya")
    ours.fuse_lora(lora_scale=1.0)
    for pipeline in (ours, theirs):
        pipeline.unload_lora_weights()
        state = pipeline.unet.state_dict()
        for parameter, value in weights.items():
            expected = convert.to_checkpoint(parameter, np.asarray(value))
            np.testing.assert_allclose(
                state[convert.to_key(parameter)], expected, atol=1e-5, err_msg=parameter
            )


@pytest.mark.parametrize(
    "name, xl, layers", [("sd15_unet", False, (2, 2, 2, 2)), ("sdxl_unet", True, (2, 2, 2))]
)
def test_every_module_of_the_published_unets_has_its_name(name, xl, layers):
    manifest = json.loads((KEYS / f"{name}.json").read_text("utf-8"))["keys"]
    modules = [
        key.removesuffix(".weight")
        for key, shape in manifest.items()
        if key.endswith(".weight") and len(shape) > 1
    ]
    keys = {module: kohya.module_key(module, layers, xl) for module in modules}
    assert len(modules) > 250
    assert len(set(keys.values())) == len(modules)
    zero = torch.zeros(1)
    state = {
        f"{key}.{part}": zero
        for key in keys.values()
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    state = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(
        state, SimpleNamespace(layers_per_block=2)
    )
    converted, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(state)
    # Attention is called as before there was PEFT: attn1.processor.to_out_lora.down.weight.
    found = {
        key.removeprefix("unet.")
        .replace(".processor.", ".")
        .replace("_lora.", ".lora.")
        .replace("to_out.lora", "to_out.0.lora")
        .removesuffix(".lora.down.weight")
        for key in converted
        if key.endswith("down.weight")
    }
    assert found == set(modules)


def test_names_that_published_files_have():
    for module, sd, xl in [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        (
            "mid_block.attentions.0.proj_in",
            "mid_block_attentions_0_proj_in",
            "middle_block_1_proj_in",
        ),
        ("mid_block.resnets.1.conv2", "mid_block_resnets_1_conv2", "middle_block_2_out_layers_3"),
        (
            "down_blocks.0.downsamplers.0.conv",
            "down_blocks_0_downsamplers_0_conv",
            "input_blocks_3_0_op",
        ),
        (
            "up_blocks.0.upsamplers.0.conv",
            "up_blocks_0_upsamplers_0_conv",
            "output_blocks_2_2_conv",
        ),
        (
            "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
            "up_blocks_1_attentions_2_transformer_blocks_1_ff_net_0_proj",
            "output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
        ),
        (
            "down_blocks.2.resnets.0.time_emb_proj",
            "down_blocks_2_resnets_0_time_emb_proj",
            "input_blocks_7_0_emb_layers_1",
        ),
    ]:
        assert kohya.module_key(module, (2, 2, 2), False) == f"lora_unet_{sd}"
        assert kohya.module_key(module, (2, 2, 2), True) == f"lora_unet_{xl}"
    for module in ("class_embedding.linear_1", "down_blocks.0.resnets.0.conv3"):
        with pytest.raises(InputError, match=f"no name for {module}: use --format=peft"):
            kohya.module_key(module, (2, 2, 2), True)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_file_says_what_it_is(world, name):
    path = world / name / "kohya" / "kohya.safetensors"
    with safe_open(path, "numpy") as file:
        said = file.metadata()
        alphas = {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}
    assert alphas == {ALPHA}
    data = path.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    xl = name == "sdxl"
    assert said["modelspec.hash_sha256"] == f"0x{digest}" and said["sshs_model_hash"] == digest
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.architecture"] == (
        "stable-diffusion-xl-v1-base/lora" if xl else "stable-diffusion-v1/lora"
    )
    assert said["modelspec.title"] == "base in 4 steps"
    assert said["modelspec.resolution"] == "16x16" and said["ss_resolution"] == "(16, 16)"
    assert said["modelspec.prediction_type"] == "epsilon"
    assert said["ss_base_model_version"] == ("sdxl_base_v1-0" if xl else "sd_v1")
    assert said["ss_v2"] == "False"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == (
        "networks.lora",
        str(RANK),
        str(ALPHA),
    )
    assert json.loads(said["ss_network_args"]) == {"conv_dim": RANK, "conv_alpha": ALPHA}
    assert (said["ss_output_name"], said["ss_steps"], said["ss_seed"]) == ("kohya", "10", "3")


def test_the_file_of_stable_diffusion_2_says_so(tmp_path):
    """Its class is that of 1.x; its UNet reads a wider text encoder."""
    miniature.write(
        tmp_path / "base",
        "StableDiffusionPipeline",
        unet={"cross_attention_dim": 1024},
        text_encoder={"hidden_size": 1024, "num_hidden_layers": 1},
    )
    write_run(tmp_path / "run", tmp_path / "base", RANK, {10: None}, r".*\.attn2\.to_k")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    fields = json.loads(path.read_text("utf-8"))
    for prediction, version, architecture, short in [
        ("epsilon", "sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
        ("v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
    ]:
        path.write_text(json.dumps(fields | {"prediction_type": prediction}), "utf-8")
        export.export(LocalWorkdir(tmp_path / "run"), tmp_path / short, "kohya")
        with safe_open(tmp_path / short / f"{short}.safetensors", "numpy") as file:
            said = file.metadata()
        assert (said["ss_base_model_version"], said["ss_v2"]) == (version, "True")
        assert said["modelspec.architecture"] == architecture
        assert said["modelspec.prediction_type"] == short
        assert said["modelspec.implementation"] == "diffusers"


def test_half_precision_keeps_alpha_and_the_hash(world, tmp_path):
    out = tmp_path / "half"
    export.export(LocalWorkdir(world / "sd15" / "run"), out, "kohya", dtype="bfloat16")
    data = (out / "half.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    said = header.pop("__metadata__")
    assert said["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data[start:]).hexdigest()}"
    for key, value in header.items():
        assert value["dtype"] == ("F32" if key.endswith(".alpha") else "BF16")


def test_the_card_and_its_snippet(world, tmp_path, monkeypatch):
    front, snippet, text = card(world / "sd15" / "kohya")
    assert front["base_model_relation"] == "adapter" and "lora" in front["tags"]
    assert "<lora:kohya:1>" in text and "schedule type Simple, 4 sampling steps" in text
    monkeypatch.chdir(world / "sd15" / "kohya")
    exec(compile(snippet, "README.md", "exec"), {})
    (world / "sd15" / "kohya" / "image.png").unlink()


def test_bad_input_is_one_line(world, tmp_path):
    miniature.write(tmp_path / "sd3", "StableDiffusion3Pipeline")
    write_run(tmp_path / "lora", tmp_path / "sd3", RANK, {10: None}, r".*\.attn\.to_q")
    write_run(tmp_path / "full", world / "sd15" / "base", 0, {10: None})
    to = ["--out", tmp_path / "out", "--format=kohya"]
    check_refusals(
        "r0_jax.export",
        [
            (
                ["--workdir", tmp_path / "lora", *to],
                "is for Stable Diffusion 1.x, 2.x and SDXL, "
                "not for Stable Diffusion 3 .*format=peft",
            ),
            (["--workdir", tmp_path / "full", *to], "trained all weights.* use --format=diffusers"),
        ],
    )
    assert not (tmp_path / "out").exists()
