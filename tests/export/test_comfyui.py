"""ComfyUI workflows: graphs that hold together, and that visit the grid of the training."""

import json

import diffusers
import numpy as np
import pytest
from runs import RANK, card, silent, write_run

from r0_jax import sample
from r0_jax.export import comfyui
from r0_jax.export import folder as export
from r0_jax.stand_ins import miniature
from r0_jax.weights import convert
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import LocalWorkdir

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"
)
# Run -> (miniature, parts left out or other fields).
RUNS = {
    "sd15": ("StableDiffusionPipeline", {}),
    "sdxl": ("StableDiffusionXLPipeline", {}),
    "sd3": ("StableDiffusion3Pipeline", {}),
    "sd3_without_t5": ("StableDiffusion3Pipeline", {"text_encoder_3": None, "tokenizer_3": None}),
    "v": (
        "StableDiffusionPipeline",
        {
            "scheduler": {
                "_class_name": "DDIMScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            }
        },
    ),
    "noisier": ("StableDiffusionPipeline", {"scheduler": {"beta_end": 0.02}}),
    "taiyi": ("Taiyi", {}),
    "z_image": ("ZImagePipeline", {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("comfyui")
    for name, (family, changes) in RUNS.items():
        miniature.write(root / name / "base", family, **changes)
        size = 16 if name == "z_image" else 0
        base = root / name / "base"
        write_run(root / name / "run", base, RANK, {10: None}, r".*\.to_q", size)
    return root


def workflow(world, name, form, base_model=None):
    """The export's graph, or None; every run is exported once a form."""
    out = world / name / form
    if not out.exists():
        export.export(LocalWorkdir(world / name / "run"), out, form, base_model=base_model)
    path = out / comfyui.FILE
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def nodes(graph):
    """Type -> its widgets by name and the types of the nodes that its inputs come from."""
    origin = {link[0]: graph["nodes"][link[1] - 1]["type"] for link in graph["links"]}
    return {
        node["type"]: dict(zip(comfyui.NODES[node["type"]][1], node["widgets_values"], strict=True))
        | {x["name"]: origin[x["link"]] for x in node["inputs"]}
        for node in graph["nodes"]
    }


def check(graph):
    """Every input is linked to an output of its type, both ends know of it, and nothing dangles."""
    assert graph["version"] == 0.4
    by_id = {node["id"]: node for node in graph["nodes"]}
    assert len(by_id) == len(graph["nodes"]) and graph["last_node_id"] == max(by_id)
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and graph["last_link_id"] == max(links)
    for number, source, slot, target, entry, kind in graph["links"]:
        output, socket = by_id[source]["outputs"][slot], by_id[target]["inputs"][entry]
        assert output["type"] == socket["type"] == kind
        assert number in output["links"] and socket["link"] == number
        assert by_id[source]["order"] < by_id[target]["order"]
    for node in by_id.values():
        inputs, widgets, outputs = comfyui.NODES[node["type"]]
        assert {x["name"]: x["type"] for x in node["inputs"]} == inputs
        assert [x["type"] for x in node["outputs"]] == list(outputs)
        assert all(x["link"] in links for x in node["inputs"])
        assert all(number in links for x in node["outputs"] for number in x["links"])
        assert len(node["widgets_values"]) == len(widgets)
        if node["type"] not in ("SaveImage", "Note"):
            assert any(x["links"] for x in node["outputs"])
    places = [tuple(node["pos"]) for node in by_id.values()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    "name, form",
    [
        ("sd15", "diffusers"),
        ("sd15", "kohya"),
        ("sdxl", "diffusers"),
        ("sdxl", "kohya"),
        ("sd3", "diffusers"),
        ("sd3", "peft"),
        ("sd3_without_t5", "peft"),
        ("v", "kohya"),
        ("sd3_without_t5", "diffusers"),
        ("z_image", "diffusers"),
        ("z_image", "peft"),
    ],
)
def test_the_graph_holds_together_and_visits_the_grid(world, name, form):
    graph = workflow(world, name, form)
    check(graph)
    found = nodes(graph)
    shift = {"sd3": "ModelSamplingSD3", "z": "ModelSamplingAuraFlow"}.get(name.split("_")[0])
    latents = found["EmptySD3LatentImage" if shift else "EmptyLatentImage"]
    assert (latents["width"], latents["height"], latents["batch_size"]) == (16, 16, 1)
    assert found["SamplerCustom"]["cfg"] == 1.0 and found["SamplerCustom"]["add_noise"] is True
    assert found["KSamplerSelect"] == {"sampler_name": "euler"}
    assert f"drop `{comfyui.FILE}`" in card(world / name / form)[2]

    visited = [float(text) for text in found["ManualSigmas"]["sigmas"].split(", ")]
    assert len(visited) == 5 and visited[-1] == 0
    grid = sample.from_run(LocalWorkdir(world / name / "run")).scheduler
    if shift:
        np.testing.assert_allclose(visited[:-1], grid.sigmas, rtol=1e-6)
        np.testing.assert_allclose(visited, [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
        assert found[shift]["shift"] == 3
        assert found["SamplerCustom"]["model"] == shift
    elif name == "v":
        np.testing.assert_allclose(visited[1:-1], grid.sigmas[1:] / grid.alphas[1:], rtol=1e-6)
        assert visited[0] == pytest.approx(4518.77, abs=0.01) and grid.alphas[0] == 0
        assert found["ModelSamplingDiscrete"]["sampling"] == "v_prediction"
        assert found["ModelSamplingDiscrete"]["zsnr"] is True
        assert found["SamplerCustom"]["model"] == "ModelSamplingDiscrete"
    else:
        # Stock Euler says the same of the exported scheduler's timesteps.
        where = world / name / form / ("scheduler" if form == "diffusers" else "")
        euler = diffusers.EulerDiscreteScheduler.from_pretrained(where)
        euler.set_timesteps(4)
        assert euler.timesteps.tolist() == grid.timesteps.tolist() == [999, 749, 499, 249]
        np.testing.assert_allclose(visited, euler.sigmas.numpy(), rtol=1e-5)
        assert "ModelSamplingDiscrete" not in found


def test_loaders_are_those_of_family_and_format(world):
    found = nodes(workflow(world, "sd15", "kohya"))
    assert found["CheckpointLoaderSimple"] == {"ckpt_name": "base.safetensors"}
    assert found["LoraLoaderModelOnly"] == {
        "lora_name": "kohya.safetensors",
        "strength_model": 1.0,
        "model": "CheckpointLoaderSimple",
    }
    assert found["CLIPTextEncode"]["clip"] == found["VAEDecode"]["vae"] == "CheckpointLoaderSimple"

    found = nodes(workflow(world, "sd15", "diffusers"))
    assert found["UNETLoader"]["unet_name"] == "diffusers/unet/diffusion_pytorch_model.safetensors"
    assert found["CLIPLoader"]["clip_name"] == "diffusers/text_encoder/model.safetensors"
    assert found["CLIPLoader"]["type"] == "stable_diffusion"
    assert found["VAEDecode"]["vae"] == "VAELoader"

    found = nodes(workflow(world, "sdxl", "diffusers"))
    assert found["DualCLIPLoader"] == {
        "clip_name1": "diffusers/text_encoder/model.safetensors",
        "clip_name2": "diffusers/text_encoder_2/model.safetensors",
        "type": "sdxl",
        "device": "default",
    }

    found = nodes(workflow(world, "sd3", "peft"))
    assert found["TripleCLIPLoader"] == {
        "clip_name1": "clip_l.safetensors",
        "clip_name2": "clip_g.safetensors",
        "clip_name3": "t5xxl_fp16.safetensors",
    }
    assert found["LoraLoaderModelOnly"]["lora_name"] == "peft/pytorch_lora_weights.safetensors"
    assert found["CLIPTextEncode"]["clip"] == "TripleCLIPLoader"

    found = nodes(workflow(world, "sd3_without_t5", "diffusers"))
    assert found["DualCLIPLoader"]["type"] == "sd3" and "TripleCLIPLoader" not in found
    assert found["UNETLoader"]["unet_name"].startswith("diffusers/transformer/")


def test_z_image_is_read_in_parts_each_of_one_file(world, monkeypatch):
    run = open_run(LocalWorkdir(world / "z_image" / "run"))
    graph = comfyui.workflow(run, "peft", world, "x", "Tongyi-MAI/Z-Image-Turbo", "a star")
    found = nodes(graph)
    assert found["UNETLoader"]["unet_name"] == "z_image_turbo_bf16.safetensors"
    encoder = {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2", "device": "default"}
    assert found["CLIPLoader"] == encoder
    assert found["VAELoader"] == {"vae_name": "ae.safetensors"}
    assert found["LoraLoaderModelOnly"]["model"] == "UNETLoader"

    monkeypatch.setattr(convert, "MAX_SHARD_SIZE", 30_000)
    file = "transformer/diffusion_pytorch_model.safetensors"
    for one_file in (False, True):
        out = world / "z_image" / f"one_file_{one_file}"
        export.export(LocalWorkdir(world / "z_image" / "run"), out, "diffusers", one_file=one_file)
        assert (out / file).exists() == (out / comfyui.FILE).exists() == one_file
        assert ("`--one_file` exports it in one" in card(out)[2]) != one_file
    graph = json.loads((out / comfyui.FILE).read_text("utf-8"))
    assert nodes(graph)["UNETLoader"]["unet_name"] == f"one_file_True/{file}"


@pytest.mark.parametrize(
    "name, form, reason",
    [
        ("taiyi", "kohya", "it does not support BERT"),
        ("sdxl", "peft", "the format of `--format=kohya`"),
        ("noisier", "kohya", "beta_end differs here"),
    ],
)
def test_no_workflow_that_comfyui_could_not_run(world, name, form, reason):
    assert workflow(world, name, form) is None
    assert "no workflow for ComfyUI: " in (text := card(world / name / form)[2]) and reason in text


def test_other_numbers_of_steps(world):
    run = open_run(LocalWorkdir(world / "sd15" / "run"))
    for steps in (1, 3):
        run.config.sampler.num_steps = steps
        graph = comfyui.workflow(
            run, "kohya", world, "x", "someone/stable-diffusion-xl-base-1.0", "a star"
        )
        check(graph)
        found = nodes(graph)
        assert found["ManualSigmas"]["sigmas"].count(",") == steps
        assert ("BasicScheduler" in found["Note"]["text"]) == (steps == 1)
        assert found["CheckpointLoaderSimple"]["ckpt_name"] == "sd_xl_base_1.0.safetensors"
        with silent():
            ddim = diffusers.DDIMScheduler.from_config(run.scheduler_config.fields)
            ddim.set_timesteps(steps)
        alphas = ddim.alphas_cumprod[ddim.timesteps].numpy()
        np.testing.assert_allclose(
            comfyui.sigmas(run)[:-1], ((1 - alphas) / alphas) ** 0.5, rtol=1e-5
        )
