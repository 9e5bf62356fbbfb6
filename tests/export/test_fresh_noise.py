"""Exports of generators that draw all noise anew at each step (sampler.eta = 1)."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from runs import CLOSE, RANK, card, difference, images_of, ours, silent, write_run

from r0_jax import sample
from r0_jax.diffusion import rollout
from r0_jax.evaluation.noise import draw_noise
from r0_jax.export import comfyui
from r0_jax.export import folder as export
from r0_jax.stand_ins import miniature
from r0_jax.workdir.workdir import LocalWorkdir

# Family -> (its class, the stock scheduler's class and the module that draws for it).
FAMILIES = {
    "sd15": (diffusers.StableDiffusionPipeline, "LCMScheduler", "scheduling_lcm"),
    "sd3": (
        diffusers.StableDiffusion3Pipeline,
        "FlowMatchEulerDiscreteScheduler",
        "scheduling_flow_match_euler_discrete",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    """(name, the folder with base, run and its whole export)."""
    root = tmp_path_factory.mktemp(request.param)
    miniature.write(root / "base", FAMILIES[request.param][0].__name__)
    write_run(root / "run", root / "base", RANK, {10: None}, r".*\.to_q")
    path = root / "run" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["sampler"] |= {"eta": 1.0, "random_eta": False}
    path.write_text(json.dumps(config), encoding="utf-8")
    export.export(LocalWorkdir(root / "run"), root / "out", "diffusers")
    return request.param, root


def test_stock_diffusers_draws_what_the_run_draws_from_the_same_noises(world, monkeypatch):
    name, root = world
    kind, scheduler, module = FAMILIES[name]
    source = sample.from_run(LocalWorkdir(root / "run"))
    shape = source.pipeline.latent_shape
    noise, keys = draw_noise(jax.random.key(0), jnp.arange(3), shape)
    noise = np.asarray(noise)
    drawn = iter(np.asarray(rollout.normal(keys, i, shape)) for i in range(4))
    monkeypatch.setattr(
        getattr(diffusers.schedulers, module),
        "randn_tensor",
        lambda *args, **kwargs: torch.from_numpy(next(drawn).transpose(0, 3, 1, 2).copy()),
    )
    with silent():
        pipeline = kind.from_pretrained(root / "out")
        pipeline.set_progress_bar_config(disable=True)
        theirs = images_of(pipeline, noise=noise)
    assert type(pipeline.scheduler).__name__ == scheduler
    found = ours(source, noise)
    assert theirs.std() > 0.05 and difference(theirs, found) < CLOSE
    # Our own reading of the export, and the run without fresh noise.
    assert difference(ours(sample.from_pipeline(root / "out", 4), noise), found) < CLOSE
    without = ours(sample.from_run(LocalWorkdir(root / "run"), eta=0), noise)
    assert difference(without, found) > 5 * CLOSE


def test_the_card_and_the_workflow_say_which_sampler_it_is(world):
    name, root = world
    graph = json.loads((root / "out" / comfyui.FILE).read_text("utf-8"))
    [sampler] = [node for node in graph["nodes"] if node["type"] == "KSamplerSelect"]
    assert sampler["widgets_values"] == ["lcm"]
    text = card(root / "out")[2]
    assert f"eta 1 ({FAMILIES[name][1]})" in text and "draws its noise anew" in text
    if name == "sd15":
        assert "timesteps 999, 749, 499, 249, as in LCM" in text
        export.export(LocalWorkdir(root / "run"), root / "kohya", "kohya")
        assert "A1111 and Forge have no sampler" in card(root / "kohya")[2]
