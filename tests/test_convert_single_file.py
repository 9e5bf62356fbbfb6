"""Single-file checkpoints, made of miniatures under their original names, come back whole."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, check_refusals
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save

from r0_jax import convert_single_file as single
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.pipelines import families, prediction
from r0_jax.stand_ins import miniature
from r0_jax.weights import single_file
from r0_jax.weights.tensor_file import TensorFile

FAMILIES = {  # name -> (miniature, changes); diffusers gives SD3's CLIP-L an identity projection
    "sd15": ("StableDiffusionPipeline", {}),
    "sdxl": ("StableDiffusionXLPipeline", {}),
    "sd3": (
        "StableDiffusion3Pipeline",
        {"text_encoder": {"projection_dim": 16}, "transformer": {"pooled_projection_dim": 28}},
    ),
}
RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]


# --- original names ----------------------------------------------------------------------


def unet(tensors, levels):
    """The UNet's of CompVis and sgm; every level has one layer down and two up."""

    def rename(key):
        for ours, theirs in [
            ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
        ]:
            if key.startswith(f"{ours}."):
                return key.replace(ours, theirs)
        head, rest = re.fullmatch(r"(\w+(?:\.\d+)?\.\w+\.\d+)\.(.+)", key).groups()
        if ".resnets." in key:
            for ours, theirs in RESNET:
                rest = re.sub(rf"^{ours}\.", f"{theirs}.", rest)
        places = {
            "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1",
            "mid_block.resnets.1": "middle_block.2",
        }
        for i in range(levels):
            places |= {
                f"down_blocks.{i}.resnets.0": f"input_blocks.{2 * i + 1}.0",
                f"down_blocks.{i}.attentions.0": f"input_blocks.{2 * i + 1}.1",
                f"down_blocks.{i}.downsamplers.0": f"input_blocks.{2 * i + 2}.0",
                f"up_blocks.{i}.upsamplers.0": f"output_blocks.{2 * i + 1}.2",
            }
            for j in range(2):
                places |= {
                    f"up_blocks.{i}.resnets.{j}": f"output_blocks.{2 * i + j}.0",
                    f"up_blocks.{i}.attentions.{j}": f"output_blocks.{2 * i + j}.1",
                }
        rest = rest.replace("conv.", "op.") if "downsamplers" in head else rest
        return f"{places[head]}.{rest}"

    return {f"model.diffusion_model.{rename(key)}": value for key, value in tensors.items()}


def vae(tensors):
    found = {}
    for key, value in tensors.items():
        for ours, theirs in [
            (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
            (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
            (r"up_blocks\.0\.resnets", "up.1.block"),
            (r"up_blocks\.1\.resnets", "up.0.block"),
            (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
            (r"mid_block\.resnets\.0", "mid.block_1"),
            (r"mid_block\.resnets\.1", "mid.block_2"),
            (r"mid_block\.attentions\.0", "mid.attn_1"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            (r"to_out\.0", "proj_out"),
            (r"to_([qkv])", r"\1"),
        ]:
            key = re.sub(ours, theirs, key)
        if "attn_1" in key and value.ndim == 2:
            value = value[..., None, None]  # once a convolution
        found[f"first_stage_model.{key}"] = value
    return found


def open_clip(tensors, prefix):
    """CLIP as open_clip has it, queries, keys and values in one."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    found = {prefix + theirs: tensors[ours] for ours, theirs in names.items()}
    found[f"{prefix}text_projection"] = np.ascontiguousarray(tensors["text_projection.weight"].T)
    layers = {key.split(".")[3] for key in tensors if ".layers." in key}
    for i in layers:
        ours, theirs = f"text_model.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
        for end in ("weight", "bias"):
            for a, b in [
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            ]:
                found[f"{theirs}{b}.{end}"] = tensors[f"{ours}{a}.{end}"]
            found[f"{theirs}attn.in_proj_{end}"] = np.concatenate(
                [tensors[f"{ours}self_attn.{x}_proj.{end}"] for x in "qkv"]
            )
    return found


def mmdit(tensors):
    def swapped(value):  # scale and shift
        return np.concatenate(np.split(value, 2)[::-1])

    found, last = {}, max(int(key.split(".")[1]) for key in tensors if "transformer_blocks" in key)
    for key, value in tensors.items():
        if "norm_out.linear" in key or f"blocks.{last}.norm1_context.linear" in key:
            value = swapped(value)
        for ours, theirs in [
            (r"transformer_blocks\.(\d+)\.", r"joint_blocks.\1."),
            (r"pos_embed\.proj", "x_embedder.proj"),
            (r"pos_embed\.pos_embed", "pos_embed"),
            (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
            (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
            (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
            (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
            (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"proj_out", "final_layer.linear"),
            (r"norm1\.linear", "x_block.adaLN_modulation.1"),
            (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
            (r"attn\.to_out\.0", "x_block.attn.proj"),
            (r"attn\.to_add_out", "context_block.attn.proj"),
            (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
            (r"ff\.net\.2", "x_block.mlp.fc2"),
            (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
            (r"ff_context\.net\.2", "context_block.mlp.fc2"),
        ]:
            key = re.sub(ours, theirs, key)
        found[key] = value
    for i in range(last + 1):
        for end in ("weight", "bias"):
            for block, names in [
                ("x_block", ["to_q", "to_k", "to_v"]),
                ("context_block", [f"add_{x}_proj" for x in "qkv"]),
            ]:
                found[f"joint_blocks.{i}.{block}.attn.qkv.{end}"] = np.concatenate(
                    [found.pop(f"joint_blocks.{i}.attn.{name}.{end}") for name in names]
                )
    return {f"model.diffusion_model.{key}": value for key, value in found.items()}


def prefixed(tensors, prefix):
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def original(folder, name):
    """The weights of a miniature under the keys of a single file."""
    parts = {path.parent.name: load_file(path) for path in folder.glob("*/*.safetensors")}
    found = vae(parts["vae"])
    if name == "sd15":
        found |= unet(parts["unet"], 1) | prefixed(
            parts["text_encoder"], "cond_stage_model.transformer."
        )
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(24)
        found["model_ema.decay"] = np.float32(0.9).reshape(1)
    elif name == "sdxl":
        found |= unet(parts["unet"], 2)
        found |= prefixed(parts["text_encoder"], "conditioner.embedders.0.transformer.")
        found |= open_clip(parts["text_encoder_2"], "conditioner.embedders.1.model.")
    else:
        found |= mmdit(parts["transformer"])
        for part, there in [
            ("text_encoder", "clip_l"),
            ("text_encoder_2", "clip_g"),
            ("text_encoder_3", "t5xxl"),
        ]:
            found |= prefixed(parts[part], f"text_encoders.{there}.transformer.")
    return found


@pytest.fixture
def bare(tmp_path):
    """The smallest file of Stable Diffusion 1.x, and an index to change."""
    first = np.zeros((4, 4, 3, 3), np.float32)
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": first,
        "cond_stage_model.transformer.x": first,
        "first_stage_model.x": first,
    }
    save_file(tensors, tmp_path / "file.safetensors")
    folder = tmp_path / "config"
    (folder / "unet").mkdir(parents=True)

    def convert(**changes):
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.30.0",
            "requires_safety_checker": True,
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        }
        (folder / "model_index.json").write_text(json.dumps(index | changes), "utf-8")
        single.convert_single_file(tmp_path / "file.safetensors", tmp_path / "out", folder)

    return convert


def test_no_module_that_a_folder_names_is_imported(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(single, "_import", lambda: pytest.fail("diffusers was called"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("class X: pass", "utf-8")
    for entry in [
        ["evil_module", "X"],
        ["diffusers", "StableDiffusionPipeline"],
        ["transformers", "AutoModel"],
        ["os", "UNet2DConditionModel"],
        {"evil_module": 1, "X": 2},
        "ab",
    ]:
        with pytest.raises(InputError, match=r"model_index.json: unet is .*not a known part"):
            bare(unet=entry)
    with pytest.raises(InputError, match=r"model_index.json: extra is .*antigravity"):
        bare(extra=["antigravity", "X"])
    assert not {"evil_module", "antigravity"} & set(sys.modules)
    with pytest.raises(pytest.fail.Exception, match="diffusers was called"):
        bare()


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "evil--x.Y"}},
        {"text_config": {"_attn_implementation_internal": "owner/kernel"}},
        {"attn_implementation": "owner/kernel"},
    ],
)
def test_no_code_that_a_config_names_is_loaded(bare, tmp_path, monkeypatch, fields):
    monkeypatch.setattr(single, "_import", lambda: pytest.fail("diffusers was called"))
    (tmp_path / "config" / "unet" / "config.json").write_text(json.dumps(fields), "utf-8")
    with pytest.raises(InputError, match=r"unet/config.json: \w+ names code to load"):
        bare()


def test_links_and_pipes_of_the_configs_are_not_followed(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(single, "_import", lambda: pytest.fail("diffusers was called"))
    (tmp_path / "secret.txt").write_text("secret", "utf-8")
    (tmp_path / "config" / "unet" / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"unet/vocab.txt is a link that leads out of"):
        bare()
    (tmp_path / "config" / "unet" / "vocab.txt").unlink()
    os.mkfifo(tmp_path / "config" / "unet" / "config.json")
    with pytest.raises(InputError, match=r"unet/config.json is a pipe or a device"):
        bare()


# --- tests -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Of every family a folder, its configs alone, and a single file."""
    root = tmp_path_factory.mktemp("single")
    for name, (family, changes) in FAMILIES.items():
        folder = root / name
        miniature.write(folder / "base", family, **changes)
        if name == "sd3":
            path = folder / "base" / "text_encoder" / "model.safetensors"
            tensors = load_file(path) | {"text_projection.weight": np.eye(16, dtype=np.float32)}
            save_file(tensors, path, {"format": "pt"})
        shutil.copytree(
            folder / "base", folder / "config", ignore=shutil.ignore_patterns("*.safetensors")
        )
        save_file(original(folder / "base", name), folder / "file.safetensors")
    return root


def check_equal(found, expected):
    """Two folders are the same pipeline."""
    found, expected = families.load(found), families.load(expected)
    assert found.params.keys() == expected.params.keys()
    for part, params in expected.params.items():
        assert found.params[part].keys() == params.keys()
        for key, value in params.items():
            np.testing.assert_array_equal(found.params[part][key], value, err_msg=f"{part} {key}")
    for name, tokenizer in expected.tokenizers.items():
        text = "a blue square above a green star 红"
        assert found.tokenizers[name](text).input_ids == tokenizer(text).input_ids
    for field, value in expected.scheduler_config.fields.items():
        assert found.scheduler_config.fields[field] == value


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_command_brings_back_the_folder(world, tmp_path, name):
    out = tmp_path / "out"
    file, config = world / name / "file.safetensors", world / name / "config"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "r0_jax.convert_single_file",
            f"--out={out}",
            f"--checkpoint={file}",
            f"--config={config}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"},
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert result.stdout.startswith(f"{out} is ") and FAMILIES[name][0] in result.stdout
    check_equal(out, world / name / "base")
    assert os.listdir(tmp_path) == ["out"] and out.stat().st_mode & 0o777 == 0o755


def test_sd3_without_t5_and_in_the_dtype_of_the_file(world, tmp_path):
    tensors = {
        key: value.astype(np.float16)
        for key, value in load_file(world / "sd3" / "file.safetensors").items()
        if "t5xxl" not in key
    }
    save_file(tensors, tmp_path / "half.safetensors")
    # Weights that lie beside the configs are not taken for what the file lacks.
    single.convert_single_file(
        tmp_path / "half.safetensors", tmp_path / "out", world / "sd3" / "base"
    )
    index = json.loads((tmp_path / "out" / "model_index.json").read_text("utf-8"))
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert not (tmp_path / "out" / "text_encoder_3").exists()
    weights = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(weights).values()} == {np.dtype(np.float16)}
    assert "text_encoder_3" not in families.load(tmp_path / "out").networks


@pytest.mark.parametrize(
    ("name", "markers", "metadata", "expected"),
    [
        ("sdxl", ["v_pred", "ztsnr"], {}, ("EulerDiscreteScheduler", "v_prediction", True)),
        ("sdxl", [], {"modelspec.prediction_type": "v"}, (None, "v_prediction", False)),
        ("sd15", ["v_pred"], {}, (None, "v_prediction", False)),
    ],
)
def test_the_file_says_what_the_network_predicts(
    world, tmp_path, caplog, name, markers, metadata, expected
):
    tensors = load_file(world / name / "file.safetensors")
    tensors |= {key: np.zeros(0, np.float32) for key in markers}
    save_file(tensors, tmp_path / "v.safetensors", metadata)
    single.convert_single_file(
        tmp_path / "v.safetensors", tmp_path / "out", world / name / "config"
    )
    path = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    fields = json.loads(path.read_text("utf-8"))
    cls, kind, zero = expected
    assert fields["prediction_type"] == kind and cls in (None, fields["_class_name"])
    assert fields.get("rescale_betas_zero_snr", False) is zero
    assert (fields.get("timestep_spacing") == "trailing") is zero or not zero
    assert families.load(tmp_path / "out").scheduler_config.noise.prediction_type == kind
    assert "prediction_type=v_prediction" in caplog.text and "the file wins" in caplog.text


def test_scaled_fp8_and_ema_are_rewritten(tmp_path):
    rng = np.random.default_rng(0)
    true = {f"model.diffusion_model.{x}.weight": rng.normal(size=(4, 3)) for x in "ab"}
    a, b = true
    scale, rows = np.float32(0.01).reshape(1), np.float32([0.1, 0.2, 0.3, 0.01])
    kinds = {"scale_weight": (a, scale), "weight_scale": (b, rows[:, None])}
    fp8 = {
        key: torch.from_numpy(true[key] / by).to(torch.float8_e4m3fn) for key, by in kinds.values()
    }
    tensors = fp8 | {
        key.replace("weight", end): torch.from_numpy(by) for end, (key, by) in kinds.items()
    }
    tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    tensors["model.diffusion_model.a.scale_input"] = torch.ones(1)
    tensors["model_ema.diffusion_modelaweight"] = torch.full((4, 3), 7.0)
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    torch_save(tensors, path)
    file = TensorFile(path)
    assert single_file.needs_rewrite(file) and single_file.has_ema(file)
    single_file.rewrite(file, out, np.dtype(np.float16))
    found = load_file(out)
    assert set(found) == {a, b, "model_ema.diffusion_modelaweight"}
    for key, by in kinds.values():
        np.testing.assert_array_equal(
            found[key], (fp8[key].float().numpy() * by).astype(np.float16)
        )
        np.testing.assert_allclose(found[key], true[key], rtol=0.07, atol=1e-3)
    with pytest.raises(InputError, match=r"no EMA weights of model\.diffusion_model\.b\.weight"):
        single_file.rewrite(file, out, np.dtype(np.float16), ema=True)
    tensors["model_ema.diffusion_modelbweight"] = torch.full((4, 3), 8.0)
    torch_save(tensors, path)
    single_file.rewrite(TensorFile(path), out, np.dtype(np.float16), ema=True)
    assert {key: value.max() for key, value in load_file(out).items()} == {a: 7, b: 8}


def test_scaled_fp8_of_a_whole_pipeline(world, tmp_path):
    tensors = {}
    for key, value in load_file(world / "sd3" / "file.safetensors").items():
        value = torch.from_numpy(value)
        tensors[key] = value.half()
        if "mlp.fc1.weight" in key and "diffusion_model" in key:
            scale = value.abs().max() / 448
            tensors[key] = (value / scale).to(torch.float8_e4m3fn)
            tensors[key.replace(".weight", ".scale_weight")] = scale.reshape(1)
    torch_save(tensors, tmp_path / "fp8.safetensors")
    single.convert_single_file(
        tmp_path / "fp8.safetensors", tmp_path / "out", world / "sd3" / "config"
    )
    part = "transformer/diffusion_pytorch_model.safetensors"
    found, true = load_file(tmp_path / "out" / part), load_file(world / "sd3" / "base" / part)
    for key, value in true.items():
        assert found[key].dtype == np.float16
        assert np.linalg.norm(found[key] - value) <= 0.05 * np.linalg.norm(value), key


def test_markers_and_metadata_of_the_noise(tmp_path):
    def find(*keys, **metadata):
        return tuple(prediction.find(keys, metadata, tmp_path))

    assert find() == (None, False)
    assert find("v_pred", **{"modelspec.prediction_type": "epsilon"}) == ("v_prediction", False)
    assert find("ztsnr") == ("v_prediction", True)
    assert find(**{"modelspec.prediction_type": "epsilon"}) == ("epsilon", False)
    assert find(ss_zero_terminal_snr="True") == ("v_prediction", True)
    for key in ("edm_vpred.sigma_max", "edm_mean"):
        with pytest.raises(InputError, match=r"EDM's noise .* not supported"):
            find(key, "v_pred")
    with pytest.raises(InputError, match="prediction_type='flow', which is not supported"):
        find(**{"modelspec.prediction_type": "flow"})


def test_zero_snr_needs_a_scheduler_that_has_it(world, tmp_path):
    shutil.copytree(world / "sd15" / "config", tmp_path / "config")
    path = tmp_path / "config" / "scheduler" / "scheduler_config.json"
    fields = json.loads(path.read_text("utf-8")) | {"_class_name": "PNDMScheduler"}
    path.write_text(json.dumps(fields | {"skip_prk_steps": True}), "utf-8")
    prediction.apply(prediction.Prediction("v_prediction", True), tmp_path / "config", tmp_path)
    changed = SchedulerConfig.from_json(json.loads(path.read_text("utf-8")))
    assert changed.class_name == "DDIMScheduler" and changed.noise.rescale_betas_zero_snr
    index = json.loads((tmp_path / "config" / "model_index.json").read_text("utf-8"))
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_the_narrowest_dtype_that_holds_all():
    assert single._common({"float16"}) == "float16"
    assert single._common({"float16", "float8_e4m3fn"}) == "float16"
    assert single._common({"bfloat16"}) == "bfloat16"
    assert single._common({"bfloat16", "float16"}) == "float32"
    assert single._common({"float16", "float32"}) == "float32"


def test_configs_of_another_size_are_told(world, tmp_path):
    file, config = world / "sd15" / "file.safetensors", tmp_path / "config"

    def told(part, said, **fields):
        shutil.copytree(world / "sd15" / "config", config)
        path = config / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")
        with pytest.raises(InputError, match=said):
            single.convert_single_file(file, tmp_path / "out", config)
        shutil.rmtree(config)

    told("unet", "expected shape", block_out_channels=[16])
    told("vae", "weights that the configs require are missing", layers_per_block=3)
    told("text_encoder", "has no .*layers.2.* for the text_encoder", num_hidden_layers=3)
    told(
        "unet",
        "does not fit the configs .*not used",
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
    )
    assert os.listdir(tmp_path) == []


def test_bad_input_is_one_line(world, tmp_path):
    good = world / "sd15" / "file.safetensors"
    tensors = load_file(good)

    def made(name, change):
        save_file(change(dict(tensors)), tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    def without(prefix):
        return lambda x: {key: v for key, v in x.items() if not key.startswith(prefix)}

    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = made("inpainting", lambda x: x | {first: np.zeros((8, 9, 3, 3), np.float32)})
    no_text = made("no_text", without("cond_stage_model."))
    no_vae = made("no_vae", without("first_stage_model."))
    two = made(
        "two",
        lambda x: (
            without("cond_stage_model.")(x)
            | {"cond_stage_model.model.ln_final.bias": np.zeros(1, np.float32)}
        ),
    )
    lora = made("lora", lambda x: {"lora_unet_conv_in.alpha": np.float32(1).reshape(1)})
    gap = made("gap", without("model.diffusion_model.middle_block.1.proj_in."))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02.")
    torch.save({"a": torch.zeros(1)}, tmp_path / "renamed.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", "utf-8")
    shutil.copytree(
        world / "sd15" / "config", tmp_path / "untold", ignore=shutil.ignore_patterns("tokenizer")
    )
    before = set(os.listdir(tmp_path))

    def call(checkpoint, config=world / "sd15" / "config", out="out"):
        return ["--checkpoint", checkpoint, "--config", config, "--out", tmp_path / out]

    check_refusals(
        "r0_jax.convert_single_file",
        [
            (["--out=o"], "missing --checkpoint"),
            ([*call(good), "--chekpoint=x"], "unknown flag --chekpoint; did you mean --checkpoint"),
            (call(tmp_path / "none.safetensors"), "none.safetensors: no such file"),
            (call("/dev/zero"), "/dev/zero is a pipe or a device, not a file"),
            (
                call(tmp_path / "old.ckpt"),
                "old.ckpt is a pickle, .*get the checkpoint as .safetensors",
            ),
            (call(tmp_path / "renamed.safetensors"), "renamed.safetensors is a pickle"),
            (call(tmp_path / "cut.safetensors"), "not a complete safetensors file"),
            (call(tmp_path / "noise.safetensors"), "not a complete safetensors file"),
            (call(lora), "not a single-file checkpoint of a pipeline .it holds lora_unet_conv"),
            (call(inpainting), "inpainting or editing: its UNet reads 9 channels"),
            (call(no_text), "Stable Diffusion 1.x .*has no text encoder"),
            (call(no_vae), "has no VAE"),
            (call(two), "Stable Diffusion 2.x"),
            (call(good, world / "sdxl" / "config"), "give the configs of the same family"),
            (call(good, tmp_path / "none"), "none is not a folder"),
            (call(good, out="full"), "full exists already"),
            (call(good), "diffusers and torch, and diffusers is not installed: .*\\[convert\\]"),
            (["--checkpoint", good, "--out", tmp_path / "out"], "give --config=DIR, .*v1-5"),
            (call(good, tmp_path / "untold"), "untold/tokenizer/vocab.json is missing"),
        ],
    )
    with pytest.raises(InputError, match="configs require are missing"):
        single.convert_single_file(gap, tmp_path / "out", world / "sd15" / "config")
    assert set(os.listdir(tmp_path)) == before
