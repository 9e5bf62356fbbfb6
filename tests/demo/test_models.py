"""Which models a page shows, and how each is drawn unless it is asked otherwise."""

import json
import os
import shutil

import pytest
from runs import write_run

from r0_jax.demo import models
from r0_jax.errors import InputError
from r0_jax.shapes import CHECKPOINTS


def test_a_folder_and_a_run(world):
    base, run = models.load([f"the base={world / 'base'}", f"R0={world / 'run'}"])
    assert (base.name, base.steps, base.guidance_scale, base.rewards) == ("the base", 25, 7.5, {})
    assert (run.name, run.steps, run.guidance_scale) == ("R0", 4, 1.0)
    assert set(run.rewards) == {"hps", "clip", "pickscore"}
    assert run.scheduler(4).timesteps.tolist() == [999, 749, 499, 249]
    assert len(base.scheduler(7).timesteps) >= 7


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("image = pipeline('x', num_inference_steps=4, guidance_scale=1).images[0]", (4, 1)),
        ("pipeline('x', num_inference_steps=40, guidance_scale=3.5)", (40, 3.5)),
        ("nothing of that kind", (25, 7.5)),
        ("num_inference_steps=4000, guidance_scale=99999", (25, 7.5)),
        ("num_inference_steps=99, guidance_scale=1", (25, 7.5)),
        ("num_inference_steps=4, guidance_scale=0", (4, 1)),
    ],
)
def test_a_card_says_how_its_export_is_drawn(world, tmp_path, card, expected):
    shutil.copytree(world / "base", tmp_path / "export")
    (tmp_path / "export" / "README.md").write_text(card, "utf-8")
    [found] = models.load([f"x={tmp_path / 'export'}"])
    assert (found.steps, found.guidance_scale) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["base"], "'base' should read name=folder"),
        (["=x"], "should read name=folder"),
        (["a/b=x"], "should read name=folder"),
        (["x={base}", "x={base}"], "names x twice"),
        (["x={world}/nothing"], "is neither a diffusers folder nor the workdir of a run"),
    ],
)
def test_flags_that_name_no_model(world, given, said):
    with pytest.raises(InputError, match=said):
        models.load([item.format(base=world / "base", world=world) for item in given])


def test_the_embedded_world_and_its_newest_run(world, tmp_path):
    for age, name in enumerate(["new", "old", "foreign"]):
        pretrained = world / "base" if name == "foreign" else CHECKPOINTS / "pipeline"
        if name == "foreign":
            shutil.copytree(world / "run", tmp_path / "deep" / name)
        else:
            write_run(tmp_path / name, pretrained, 2, {10: 0.5}, targets=r".*\.attn2\.to_q")
            os.utime(tmp_path / name / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").write_text(json.dumps([1]), "utf-8")
    found = models.of_world(tmp_path)
    assert [model.name for model in found] == ["base", "base in 4 steps", "R0: new"]
    assert [(m.steps, m.guidance_scale) for m in found] == [(25, 3.0), (4, 1.0), (4, 1.0)]
    assert set(found[0].rewards) == {"clip_score", "preference", "aesthetic", "heldout_clip"}
    assert len(models.of_world(tmp_path / "nothing here")) == 2
