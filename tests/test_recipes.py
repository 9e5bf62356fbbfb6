"""The recipes of real models, run from end to end on their miniatures."""

import json
import os
from pathlib import Path

import jax
import pytest
from dry_runs import ROOT, cache, run  # noqa: F401 (cache is a fixture)
from published import config_of
from runs import commands

from configs import (
    di_plus_plus,
    draft,
    refl,
    rg_lcm,
    sd3_r0,
    sd15_r0,
    sd35_r0,
    sdxl_r0,
    taiyi_r0,
    z_image_r0,
)
from r0_jax import config as base
from r0_jax import config_check, rewards
from r0_jax.errors import InputError
from r0_jax.method import lora
from r0_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.pipelines.folder import NETWORKS
from r0_jax.plan import memory, weightless
from r0_jax.prompts import columns, files
from r0_jax.stand_ins import miniature_files
from r0_jax.weights import convert
from r0_jax.weights.network import Network

REWARDS = {  # what each recipe trains on
    **{
        name: ["hps_v2_1", "image_reward", "clip_score"]
        for name in ("sd15", "sdxl", "sd3", "sd35", "z_image")
    },
    "taiyi": ["chinese_clip", "aesthetic"],
}
RECIPES = {
    "sd15": sd15_r0,
    "sdxl": sdxl_r0,
    "sd3": sd3_r0,
    "sd35": sd35_r0,
    "taiyi": taiyi_r0,
    "z_image": z_image_r0,
}


@pytest.mark.parametrize(
    "name, variants",
    [("sd15", "dryrun,full"), ("sdxl", "dryrun"), ("sd3", "dryrun"), ("taiyi", "dryrun")],
)
def test_a_dry_run_trains_evaluates_and_exports(tmp_path, name, variants):
    """One also resumes, of all weights. What an evaluation says of each term is that one's too."""
    workdir, resumes = tmp_path / "run", name == "sd15"
    # The steps of a run may be raised where no schedule depends on them.
    constant = "--config.optimizer.schedule=constant"
    flags = [f"--config=configs/{name}_r0.py:{variants}", f"--workdir={workdir}", constant]
    if name == "sdxl":
        tiny_decoder(tmp_path / "taesdxl")
        flags.append(f"--config.objective.decoder={tmp_path / 'taesdxl'}")
    calls = [flags]
    if resumes:
        calls.insert(0, [*flags, "--config.steps=2", "--config.test.prompts="])
    else:
        flags += ["--config.steps=2", "--config.eval.term_norms=False"]
    for call in calls:
        ended = run("main", *call)
        assert ended.returncode == 0, ended.stderr
    assert "report: " in ended.stdout
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [1, 2, 3, 4] if resumes else [1, 2]
    assert [line["step"] for line in lines if "train/loss" in line] == steps
    best = RECIPES[name].get_config().best_metric
    assert [line["step"] for line in lines if best in line] == [0, *steps[1::2]]
    for reward in REWARDS[name]:  # of four different networks, all of which move the image
        norms = [line[f"norm/reward_grads/{reward}"] for line in lines if "train/loss" in line]
        assert min(norms) > 0, reward
    assert all(line["norm/x0/guidance"] > 0 for line in lines if "train/loss" in line)
    table = json.loads((workdir / "eval.json").read_text())["models"]
    assert len(table) == 3 and "r0_4" in table

    config = json.loads((workdir / "config.json").read_text())
    assert os.environ["XDG_CACHE_HOME"] in config["data"]["prompts"]
    forms = ["diffusers"] + ["peft"] * ("full" not in variants)
    for status, _, stderr in commands(
        "r0_jax.export",
        [["--workdir", workdir, "--out", tmp_path / form, f"--format={form}"] for form in forms],
    ):
        # The best of four steps may be the first, before any was taken.
        untrained = stderr.startswith("warning: step 0 is the pretrained generator")
        assert status == 0 and (untrained or not stderr), stderr
    assert families.load(tmp_path / "diffusers", family=config["family"])


@pytest.mark.parametrize("name", RECIPES)
def test_rewards_are_the_papers_and_a_dry_run_has_the_same_types(name):
    plain, dry = RECIPES[name].get_config(), RECIPES[name].get_config("dryrun")
    assert set(plain.rewards) == set(REWARDS[name])
    folders = set()
    for section in ("rewards", "heldout_rewards"):
        assert list(plain[section]) == list(dry[section])
        for reward, entry in dry[section].items():
            assert entry.type == plain[section][reward].type
            assert entry.weight == plain[section][reward].weight > 0
            assert str(plain[section][reward].path).startswith("models/")
            assert os.environ["XDG_CACHE_HOME"] in entry.path
            assert rewards.load(reward, entry).name == reward
            folders.add(entry.path)
    assert len(folders) == len(plain.rewards) + len(plain.heldout_rewards)
    assert plain.best_metric.removeprefix("heldout/") in plain.heldout_rewards


def test_rewards_of_english_judge_taiyi_by_a_translation():
    plain, english = taiyi_r0.get_config(), taiyi_r0.get_config("english,r0plus")
    assert set(english.rewards) - set(plain.rewards) == {"hps_v2_1"}
    assert set(english.heldout_rewards) - set(plain.heldout_rewards) == {"pickscore"}
    assert english.objective.method == "r0plus"
    dry = taiyi_r0.get_config("dryrun,english")
    entries = dict(dry.rewards) | dict(dry.heldout_rewards)
    loaded = [rewards.load(name, entry) for name, entry in entries.items()]
    assert {reward.name for reward in loaded if reward.reads == "english"} == {
        "hps_v2_1",
        "pickscore",
    }
    texts = files.read_texts(dry.data.prompts, columns.read_by(loaded))
    assert not all(map(str.isascii, texts["prompt"])) and all(map(str.isascii, texts["english"]))
    plain_file = Path(dry.data.prompts).with_name("prompts.txt")
    with pytest.raises(InputError, match="english"):
        files.read_texts(plain_file, columns.read_by(loaded))


def test_the_adapters_of_sd35_are_on_its_second_attention_too():
    built = weightless.load(sd35_r0.get_config("dryrun"), sharding.make_mesh({}, jax.devices()[:1]))
    names = set(built.abstract_state.params)
    assert "transformer_blocks.0.attn2.to_q.lora_A.kernel" in names
    assert "transformer_blocks.1.attn2.to_q.lora_A.kernel" not in names


def test_a_rank_that_a_layer_has_not_is_one_line(tmp_path):
    result = run(
        "main",
        "--config=configs/sd15_r0.py:dryrun",
        f"--workdir={tmp_path / 'w'}",
        "--config.lora.rank=9",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "lora.rank=9 is above what fits down_blocks.0.attentions.0.proj_in" in line
    assert "use 8 at most" in line


def tiny_decoder(folder):
    fields = {"_class_name": "AutoencoderTiny"}
    for half in ("encoder", "decoder"):
        fields |= {f"{half}_block_out_channels": [8, 8], f"num_{half}_blocks": [1, 1]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    config = AutoencoderTinyConfig.from_json(fields)
    network = Network.abstract(lambda rngs: AutoencoderTiny(config, rngs=rngs))
    convert.save(
        miniature_files.random_params(network, 0), folder / "diffusion_pytorch_model.safetensors"
    )


def test_without_weights_a_recipe_says_what_is_missing(tmp_path):
    result = run("main", "--config=configs/sd3_r0.py", f"--workdir={tmp_path / 'w'}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "pretrained is not set" in line and "accept its licence" in line


@pytest.mark.parametrize("name", RECIPES)
def test_variants_change_what_they_say_and_combine(name):
    recipe = RECIPES[name]
    plain, both = recipe.get_config(), recipe.get_config("r0plus,full")
    assert both.objective.method == "r0plus"
    assert recipe.get_config("r0").objective.method == "r0"
    assert plain.objective.method == ("r0" if name in ("sd15", "taiyi") else "r0plus")
    assert plain.lora.rank == 64 and both.lora.rank == 0
    assert both.optimizer.learning_rate < plain.optimizer.learning_rate
    assert not config_check.without_effect(both) and not config_check.without_effect(plain)
    dry = recipe.get_config("dryrun")
    for kept in ("family", "regularizers", "optimizer", "sampler", "objective", "best_metric"):
        assert dry[kept] == plain[kept], kept
    assert dry.lora.targets == plain.lora.targets
    assert dry.lora.alpha / dry.lora.rank == plain.lora.alpha / plain.lora.rank
    with pytest.raises(InputError, match="variant 'r1' is unknown; known: r0, r0plus, full, dryr"):
        recipe.get_config("r1")
    with pytest.raises(InputError, match="r0 and r0plus exclude each other"):
        recipe.get_config("r0,r0plus")
    assert set(plain) == set(base.get_config())


PEERS = {"rg_lcm": rg_lcm, "di_plus_plus": di_plus_plus, "refl": refl, "draft": draft}


@pytest.mark.parametrize("peer", ["rg_lcm", "di_plus_plus"])
@pytest.mark.parametrize("family", RECIPES)
def test_a_peers_recipe_is_a_familys_with_another_objective(peer, family):
    own, found = RECIPES[family].get_config(), PEERS[peer].get_config(family)
    for kept in ("family", "rewards", "heldout_rewards", "best_metric", "batch_size", "steps"):
        assert found[kept] == own[kept], kept
    assert found.lora == own.lora and found.regularizers != own.regularizers
    assert found.regularizers.output.weight == found.regularizers.weight.weight == 0
    for variants in (f"{family},full", f"dryrun,{family},r0"):
        changed = PEERS[peer].get_config(variants)
        assert not config_check.without_effect(changed)
        assert (changed.lora.rank == 0) == ("full" in variants)
    config_check.check_config(changed)  # of the dry run, whose pipeline is there
    assert changed.steps == 4 and changed.objective.method == "r0"


@pytest.mark.parametrize("peer", ["refl", "draft"])
@pytest.mark.parametrize("family", RECIPES)
def test_a_relatives_recipe_keeps_the_guided_steps_of_a_familys_base(peer, family):
    own, found = RECIPES[family].get_config(), PEERS[peer].get_config(family)
    for kept in ("family", "rewards", "heldout_rewards", "best_metric", "lora", "veto"):
        assert found[kept] == own[kept], kept
    assert found.sampler.guidance_scale == own.test.guidance_scale == found.test.guidance_scale
    assert found.sampler.num_steps == found.test.base_steps >= 40 and not found.sampler.random_eta
    weights = {name: term.weight for name, term in found.regularizers.items() if term.weight}
    assert weights == {"weight": own.regularizers.weight.weight}
    for variants in (f"{family},full", f"dryrun,{family}"):
        changed = PEERS[peer].get_config(variants)
        assert not config_check.without_effect(changed)
    config_check.check_config(changed)


@pytest.mark.parametrize("method", ["refl", "draft", "drtune"])
def test_a_relatives_step_of_a_transformer(method):
    config = (refl if method == "refl" else draft).get_config("sd3,dryrun")
    if method == "draft":
        config.objective.noises = 2
    if method == "drtune":
        config.objective.method, config.objective.grad_steps = "drtune", 3
    with config.unlocked():  # other tests trace the rewards
        config.rewards = {}
    config.regularizers.output.weight = 1.0
    built = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1]))
    _, metrics = jax.eval_shape(built.step, *built.abstract)
    assert "norm/x0/output" in metrics


def test_both_distillation_losses_are_a_step_of_a_transformer():
    config = di_plus_plus.get_config("sd3,dryrun")
    config.regularizers.consistency.weight = 1.0
    with config.unlocked():  # other tests trace the rewards
        config.rewards = {}
    built = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1]))
    state, metrics = jax.eval_shape(built.step, *built.abstract)
    assert {"norm/x0/score", "norm/x0/consistency", "train/fake_loss"} < set(metrics)
    assert state.fake.params.keys() == built.abstract_state.params.keys()
    # `plan` counts its bytes: parameters and two moments.
    held = memory.bytes_by_kind(memory.held(built))
    adapters = sum(x.size for x in jax.tree.leaves(built.abstract_state.fake.params))
    assert held["fake score"] == pytest.approx(12 * adapters, abs=100)


def test_a_peers_recipe_knows_its_families():
    assert PEERS["rg_lcm"].get_config().family == "StableDiffusionPipeline"
    with pytest.raises(InputError, match=r"'sd4' is unknown; known: a family \(sd15, sdxl"):
        PEERS["rg_lcm"].get_config("sd4")
    with pytest.raises(InputError, match="sdxl and sd3 are two families"):
        PEERS["rg_lcm"].get_config("sdxl,sd3")


@pytest.mark.parametrize(
    "name, folder, count",
    [
        ("sd15", "stable_diffusion/unet", 16 * 8 + 16 * 2 + 16 * 2),
        ("sdxl", "stable_diffusion_xl/unet", 70 * 8 + 70 * 2 + 11 * 2),
        ("sd3", "stable_diffusion_3/transformer", 24 * 8 - 1 + 24 * 4 - 2),
        ("z_image", "z_image/transformer", 34 * 7),
    ],
)
def test_adapters_are_on_all_linear_layers_of_the_transformers(name, folder, count):
    """Attention, feed-forward and the way in and out; the last block of SD3 drops the text."""
    fields = config_of(folder)
    build, _ = NETWORKS[fields["_class_name"]]
    shapes = Network.abstract(lambda rngs: build(fields, rngs)).shapes
    assert len(lora.targets(shapes, RECIPES[name].get_config().lora.targets)) == count
