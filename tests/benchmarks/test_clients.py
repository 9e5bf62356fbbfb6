"""What `make clients` gives to clients, and what it makes of their answers."""

import json
import sys

import jax
import numpy as np
import pytest
from diffusers.loaders import single_file_utils
from runs import check_refusals
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load

from benchmarks.clients import api_prompt, checks, comfyui_server, material, report, single_file
from benchmarks.clients.checks import Check, Client
from benchmarks.clients.programs import deltas
from benchmarks.clients.setting import FAMILIES, Places
from r0_jax import convert_single_file
from r0_jax.errors import InputError
from r0_jax.export import comfyui
from r0_jax.export import folder as export
from r0_jax.pipelines import families
from r0_jax.stand_ins import miniature
from r0_jax.workdir.workdir import LocalWorkdir

PART = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A miniature, a run of random adapters, and two exports of it."""
    at = Places(tmp_path_factory.mktemp("clients") / "sd15")
    miniature.write(at.pipeline, "StableDiffusionPipeline")
    material.write_run(at.run, at.pipeline, FAMILIES["sd15"].targets, at.adapters)
    for form in ("diffusers", "kohya"):
        export.export(LocalWorkdir(at.run), at.export(form), form)
    return at


# --- what clients are given -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_holds_a_pipeline_under_its_first_names(tmp_path, family):
    folder, out = tmp_path / "folder", tmp_path / "out"
    miniature.write(folder, FAMILIES[family].kind)
    single_file.write(folder, tmp_path / "file.safetensors")
    convert_single_file.convert_single_file(tmp_path / "file.safetensors", out, folder)
    ours, back = families.load(folder).params, families.load(out).params
    assert jax.tree.structure(ours) == jax.tree.structure(back)
    for part, params in ours.items():
        for name, value in params.items():
            np.testing.assert_array_equal(value, back[part][name], err_msg=f"{part}.{name}")


def test_a_single_file_of_sd3_is_that_of_its_authors(tmp_path):
    folder = tmp_path / "folder"
    miniature.write(folder, "StableDiffusion3Pipeline")
    single_file.write(folder, tmp_path / "file.safetensors")
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        torch_load(tmp_path / "file.safetensors")
    )
    ours = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, value in ours.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize(
    "module, name",
    [
        ("down_blocks.1.attentions.1.proj_in", "input_blocks.5.1.proj_in"),
        ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
        ("mid_block.resnets.1.conv1", "middle_block.2.in_layers.2"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),  # where is no attention
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ],
)
def test_names_of_a_unet_at_full_size(module, name):
    assert single_file.unet_name(module, 2, [False, True, True, True]) == name


def test_weights_are_known_by_their_values_under_any_name(world):
    found = deltas.Deltas(world.pipeline / PART, world.adapters)
    assert len(found.modules) > 20
    for key, weight in load_file(world.pipeline / PART).items():
        found.find(f"x.{key}", weight)
    final = load_file(world.export("diffusers") / PART)
    for key, weight in final.items():
        found.take(f"x.{key}", weight)
    good = found.result()
    assert good["error"] < checks.CLOSE < 1e-2 < good["largest"] and not good["absent"]
    found.take("x.conv_in.weight", final["conv_in.weight"] + np.float32(1e-5))  # has no adapter
    assert checks.CLOSE < found.result()["error"] < 2e-5


def test_weights_that_lie_in_one_another_and_what_is_absent(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"{name}.weight": rng.standard_normal((4, 60), np.float32) for name in "qkv"}
    base = {key: value.astype(np.float16).astype(np.float32) for key, value in base.items()}
    factors = {"A": rng.standard_normal((2, 60), np.float32), "B": np.ones((4, 2), np.float32)}
    adapters = {f"{name}.{side}": value for name in "kv" for side, value in factors.items()}
    save_file(base, tmp_path / "base")
    save_file(adapters, tmp_path / "adapters")
    found = deltas.Deltas(tmp_path / "base", tmp_path / "adapters")
    fused = np.concatenate([base["q.weight"], base["k.weight"]])
    found.find("qk", fused)
    fused[4:] += factors["B"] @ factors["A"]
    found.take("qk", fused)
    assert found.result()["absent"] == ["v"] and found.result()["error"] < 1e-5
    found.take("qk", np.roll(fused, 4, 0))
    assert found.result()["error"] > 0.1


# --- ComfyUI --------------------------------------------------------------------------------------


def definitions(**changes):
    """Those of a server with our nodes, as GET /object_info gives them."""
    found = {}
    for kind, (inputs, widgets, _) in comfyui.NODES.items():
        declared = {name: [type_] for name, type_ in inputs.items()}
        for name in widgets:
            declared[name] = [["a", "b"]] if name.endswith("_name") else ["FLOAT", {"min": 0}]
        if declared.pop("control_after_generate", None):
            declared["noise_seed"] = ["INT", {"control_after_generate": True}]
        optional = {"device": declared.pop("device")} if "device" in declared else {}
        found[kind] = {"input": {"required": declared, "optional": optional}}
    return found | changes


def test_a_graph_becomes_what_the_server_takes(world):
    graph = json.loads((world.export("kohya") / comfyui.FILE).read_text("utf-8"))
    prompt = api_prompt.convert(graph, definitions())
    by_kind = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert "Note" not in by_kind and not api_prompt.replaced(graph, definitions())
    sampler = by_kind["SamplerCustom"]
    assert sampler.keys() == {
        *comfyui.NODES["SamplerCustom"][0],
        *("add_noise", "noise_seed", "cfg"),
    }
    assert (sampler["noise_seed"], sampler["cfg"]) == (0, 1.0)
    assert prompt[sampler["model"][0]]["class_type"] == "LoraLoaderModelOnly"
    number, slot = by_kind["VAEDecode"]["vae"]
    assert (prompt[number]["class_type"], slot) == ("CheckpointLoaderSimple", 2)
    assert by_kind["EmptyLatentImage"] == {"width": 128, "height": 128, "batch_size": 1}


def test_an_older_server_gets_the_scheduler_of_the_note(world):
    graph = json.loads((world.export("diffusers") / comfyui.FILE).read_text("utf-8"))
    known = definitions()
    del known["ManualSigmas"]
    assert api_prompt.replaced(graph, known)
    prompt = api_prompt.convert(graph, known)
    (node,) = (x["inputs"] for x in prompt.values() if x["class_type"] == "BasicScheduler")
    assert (node["scheduler"], node["steps"], node["denoise"]) == ("simple", 4, 1.0)
    assert prompt[node["model"][0]]["class_type"] == "UNETLoader"
    (loader,) = (x["inputs"] for x in prompt.values() if x["class_type"] == "CLIPLoader")
    assert loader["device"] == "default"


@pytest.mark.parametrize(
    "inputs, said",
    [
        ({"required": {}}, "VAELoader has no input for all"),
        ({"required": {"vae_name": [["a"]], "more": ["INT"]}}, "VAELoader has an input more"),
    ],
)
def test_a_node_that_has_changed_is_told(world, inputs, said):
    graph = json.loads((world.export("diffusers") / comfyui.FILE).read_text("utf-8"))
    with pytest.raises(InputError, match=said):
        api_prompt.convert(graph, definitions(VAELoader={"input": inputs}))
    known = definitions()
    del known["VAELoader"]
    with pytest.raises(InputError, match="no node VAELoader"):
        api_prompt.convert(graph, known)


SERVER = """
import http.server, json, pathlib, sys
flags = dict(flag.split("=", 1) for flag in sys.argv[1:] if "=" in flag)
base = pathlib.Path(flags["--base-directory"])
KNOWN = json.loads(pathlib.Path(__file__).with_name("known.json").read_text())

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = {"/system_stats": {}, "/object_info": KNOWN}.get(self.path)
        self.answer(STATUS if answer is None else answer)

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        loaded = [x["inputs"] for x in prompt.values() if "Loader" in x["class_type"]]
        for folder, field in (("checkpoints", "ckpt_name"), ("loras", "lora_name")):
            (name,) = (x[field] for x in loaded if field in x)
            assert (base / "models" / folder / name).is_file()
        (base / "output" / "a.png").write_bytes(b"an image")
        self.answer({"prompt_id": "7"})

    def answer(self, found):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

http.server.HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
"""


@pytest.mark.parametrize("status", ["success", "error"])
def test_a_server_draws_the_workflow_of_an_export(world, tmp_path, status):
    messages = [["execution_error", {"node_type": "VAEDecode", "exception_message": "too large"}]]
    answer = {"7": {"status": {"status_str": status, "messages": messages}}}
    (tmp_path / "main.py").write_text(SERVER.replace("STATUS", repr(answer)))
    (tmp_path / "known.json").write_text(json.dumps(definitions()))
    world.single.touch()
    # As `base_model` names it: the miniature has no published name.
    family = FAMILIES["sd15"]._replace(checkpoint=world.pipeline.name)
    arguments = (tmp_path, sys.executable, family, "kohya", world, tmp_path / "image.png")
    if status == "error":
        with pytest.raises(InputError, match="kohya: VAEDecode: too large"):
            comfyui_server.draw(*arguments)
        return
    found = comfyui_server.draw(*arguments)
    assert found["windows"].keys() == {"start", "draw"} and not found["replaced"]
    assert (tmp_path / "image.png").read_bytes() == b"an image"
    assert not (world.folder / "comfyui").exists()


# --- stock diffusers ------------------------------------------------------------------------------


def test_stock_diffusers_takes_the_adapters_of_a_miniature(world):
    """The program itself, as on full-width models."""
    check = Check("sd15", "diffusers", "weights", "kohya")
    found = checks.run(check, checks.OURS, world)
    assert checks.is_good(found) and found["keys"] == 3 * found["modules"] > 60
    assert found["error"] < 1e-6 < 1e-2 < found["largest"] and found["deviation"] > 5


# --- results --------------------------------------------------------------------------------------


GOOD = {"version": "1.2", "commit": "", "keys": 12, "error": 2e-8, "largest": 0.1, "modules": 4}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, "good"),
        ({"color_error": 2.0}, "good"),
        ({"error": 2e-6}, "**wrong**: too far"),
        ({"color_error": 3.0}, "**wrong**: too far"),
        ({"ignored": ["a.b"]}, "**wrong**: 1 ignored, the first a.b"),
        ({"absent": ["c.d", "e"]}, "**wrong**: 2 layers unchanged, the first c.d"),
        ({"failure": "status 1: OSError: no | file"}, "**failed**: status 1: OSError: no / file"),
    ],
)
def test_the_report_says_how_a_client_fares(tmp_path, change, said):
    at = Places(tmp_path / "sd15")
    at.folder.mkdir()
    check = Check("sd15", "forge", "weights", "kohya")
    (at.folder / f"{check.name}.json").write_text(json.dumps(GOOD | change))
    found = report.text(tmp_path)
    (row,) = (line for line in found.splitlines() if line.startswith("| Forge 1.2 |"))
    assert row.endswith(f"| {said} |") and "| 12 |" in row
    assert "| ComfyUI | kohya, image |" in found
    assert "not run: `make clients FLAGS='--family=sd15 --comfyui=DIR" in found
    assert report.failed(tmp_path) == ([] if said == "good" else [f"sd15 {check.name}"])


def test_a_program_that_fails_is_a_result(tmp_path, monkeypatch):
    at = Places(tmp_path)
    program = tmp_path / "in_forge.py"
    program.write_text("import sys; print('loading'); sys.exit('SystemExit: no room')")
    monkeypatch.setattr(checks, "_PROGRAMS", tmp_path)
    monkeypatch.setattr(checks, "_given", lambda *arguments: {})
    check, client = Check("sd15", "forge", "weights", "kohya"), Client(None, sys.executable)
    assert checks.run(check, client, at)["failure"] == "status 1: SystemExit: no room"
    assert not checks.is_good(checks.result(check, at))
    program.write_text("import sys; print('loading'); print('{\"keys\": 3}')")
    assert checks.run(check, client, at)["keys"] == 3
    assert checks.is_good(checks.result(check, at))


def test_flags_that_cannot_be(tmp_path):
    check_refusals(
        "benchmarks.clients",
        [
            (["--family=sd9"], "--family=sd9 is unknown; known: sd15"),
            ([f"--comfyui={tmp_path}"], "is no checkout of ComfyUI: it has no main.py"),
            (["--forge_python=x"], "--forge_python is for --forge=DIR, which is missing"),
            ([f"--sdcpp_python={tmp_path}"], "is not a program: give a Python"),
        ],
    )
