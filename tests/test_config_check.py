"""What a config may hold."""

import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax import config_check
from r0_jax.errors import ConfigError, InputError
from r0_jax.method import optim
from r0_jax.shapes import CHECKPOINTS
from r0_jax.training import train


def config(**rewards):
    found = base.get_config()
    found.pretrained, found.data.prompts = str(CHECKPOINTS / "pipeline"), "prompts.txt"
    found.regularizers.weight.weight = 1e-4
    with found.unlocked():
        found.rewards.clip = base.reward_entry("clip_score", path="clip")
        found.rewards.update(rewards)
    return found


def test_the_base_and_a_reward_are_enough():
    config_check.check_config(config())
    config_check.check_config(config(own=entry_with(type="function", weight=2, function="a:b")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test.guidance_scale", math.nan),
        ("test.guidance_scale", math.inf),
        ("optimizer.learning_rate", math.nan),
    ],
)
def test_numbers_that_are_not_finite_wherever_they_stand(field, value):
    found = config()
    found.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=f"^{field}={value} must be "):
        config_check.check_config(found)


def test_only_a_clip_norm_may_be_infinite():
    found = config()
    found.optimizer.clip_norm = math.inf  # no clipping
    config_check.check_config(found)
    optim.make_optimizer(found)
    found.optimizer.clip_norm = math.nan
    config_check.check_config(found)  # which leaves this number to the optimizer
    with pytest.raises(InputError, match=r"^optimizer\.clip_norm=nan must be "):
        optim.make_optimizer(found)


@pytest.mark.parametrize(
    "override",
    [
        {"lora.alpha": math.nan},
        {"lora.alpha": math.inf},
        {"objective.delta": math.nan},
        {"regularizers.guidance.scale": math.nan},
        {"regularizers.guidance.scale": 1e308},
        {"test.guidance_scale": 1e30},
        {"test.guidance_scale": -1.0},
        {"regularizers.guidance.most": 1.5},
        {"regularizers.feature.least": -0.1},
        {"regularizers.weight.weight": math.inf},
    ],
)
def test_numbers_that_no_step_survives(override):
    found = config()
    found.update_from_flattened_dict(override)
    [(field, value)] = override.items()
    with pytest.raises(InputError, match=re.escape(f"{field}={value} must be")):
        config_check.check_config(found)


def test_attention_that_this_machine_has_not():
    found = config()
    found.attention = "cudnn"
    with pytest.raises(InputError, match="attention='cudnn' needs an NVIDIA GPU"):
        config_check.check_config(found)


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("regularizers", "wieght", "regularizers.wieght; did you mean regularizers.weight"),
        ("objective", "qqqqqq", "objective.qqqqqq"),
    ],
)
def test_a_field_that_a_recipe_adds_to_the_base(section, name, said):
    found = config()
    with found.unlocked():
        found[section][name] = 1.0
    with pytest.raises(InputError, match=f"an unknown field, {said}"):
        config_check.check_config(found)


def entry_with(**fields):
    return ConfigDict({**base.reward_entry("clip_score").to_dict(), **fields})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (3, "rewards.own has an unknown or missing field, cap"),
        (entry_with(path=Path("clip")), "rewards.own.path=.* of type str"),
        (entry_with(weight="1"), "rewards.own.weight='1' must be of type float"),
        (entry_with(weight=math.nan), "rewards.own.weight=nan must be finite"),
        (entry_with(cap=math.nan), "rewards.own.cap=nan must be finite"),
    ],
)
def test_a_reward_that_is_none(entry, said):
    with pytest.raises(InputError, match=said):
        config_check.check_config(config(own=entry))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"sampler.eta": 0.5}, "sampler.eta=0.5 must be 0 or 1: stock samplers"),
        ({"sampler.num_steps": 51}, "sampler.num_steps=51 must be from 1 to 50"),
        ({"sampler.guidance_scale": 0.5}, "sampler.guidance_scale=0.5 must be from 1 to"),
        ({"objective.method": "dpo"}, "objective.method='dpo' is unknown; use 'r0' or 'r0plus' or"),
        ({"objective.method": "refl"}, "late_steps=10 must be at most sampler.num_steps=4"),
        (
            {"objective.method": "drtune", "objective.late_steps": 2},
            "grad_steps=4 must be between 1 and 3: with sampler.num_steps=4",
        ),
        ({"objective.noises": 2}, "noises=2 needs objective.method='r0' and .*grad_steps=1"),
        ({"regularizers.guidance.form": "push"}, "guidance.form='push' is unknown; use 'pull' or"),
        ({"regularizers.guidance.least": 0.99}, "guidance.least=0.99 is above .*most=0.98"),
        ({"regularizers.score.form": "js"}, "score.form='js' is unknown; use 'kl' or 'sim'"),
        ({"regularizers.score.updates": 0}, "score.updates=0 must be at least 1"),
        ({"regularizers.score.b1": 1.0}, "score.b1=1.0 must be from 0 to 0.9999"),
        ({"regularizers.consistency.form": "l1"}, "consistency.form='l1' is unknown; use 'huber'"),
        ({"regularizers.consistency.target": "x"}, "consistency.target='x' is unknown; use 'gen"),
        ({"regularizers.consistency.least": 16.0}, "consistency.least=16 is above .*most=15"),
        ({"regularizers.consistency.skip": 0.0}, "consistency.skip=0.0 must be from 0.001 to 1"),
        ({"rewards.clip.weight": 0.0}, "no reward has a weight and no regularizer pulls at x0"),
        ({"rewards.clip.weight": 0.0, "best_metric": "eval/clip"}, "no reward has a weight"),
    ],
)
def test_settings_that_make_no_objective(override, said):
    found = config()
    found.update_from_flattened_dict(override)
    with pytest.raises(InputError, match=said):
        config_check.check_config(found)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seed", -1, "seed=-1 must be from 0"),
        ("mesh.data", 7, r"mesh data=7 .* does not fit"),
        ("batch_size", 0, "batch_size=0 "),
        ("sharding", [("(", "fsdp")], r"sharding rule '\(' is not a regular expression"),
        ("sharding", ["fsdp"], "sharding rule 'fsdp' is not a pair"),
    ],
)
def test_a_command_knows_that_the_config_is_at_fault(field, value, said):
    """It then names the file of the config."""
    found = config()
    found.test.prompts = ""
    found.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=said):
        train.check(found)


GUIDED = {"regularizers.guidance.weight": 1.0}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"objective.method": "r0plus", "objective.grad_steps": 2}, "objective.grad_steps, as"),
        (
            {
                "objective.method": "refl",
                "objective.late_steps": 2,
                "objective.grad_steps": 2,
            },
            "objective.grad_steps, as",
        ),
        ({"objective.late_steps": 2}, "objective.late_steps, as objective.method is r0"),
        ({"objective.method": "r0plus", "objective.bound": 2.0}, "objective.bound, as"),
        ({"objective.normalization": "none", "objective.delta": 1.0}, "objective.delta, as"),
        ({"lora.rank": 0, "lora.alpha": 8.0, "lora.targets": "x"}, "lora.alpha, lora.targets, as"),
        ({"regularizers.guidance.scale": 7.5}, "guidance.scale, as .*guidance.weight is 0"),
        (
            GUIDED
            | {"regularizers.guidance.form": "direction", "regularizers.guidance.scale": 7.5},
            "guidance.scale, as regularizers.guidance.form is direction",
        ),
        ({"regularizers.gradient.samples": 3}, "gradient.samples, as .*gradient.weight is 0"),
        (
            {
                "regularizers.consistency.weight": 1.0,
                "regularizers.consistency.form": "l2",
                "regularizers.consistency.c": 0.1,
            },
            "consistency.c, as regularizers.consistency.form is l2",
        ),
        (
            {"regularizers.output.weight": 1.0, "regularizers.output.scale": 2.0},
            "output.scale, as regularizers.output.guided is false",
        ),
        (GUIDED | {"rewards.clip.weight": 0.0}, "rewards.clip, as its weight is 0"),
        ({"rewards.clip.size": 224}, "rewards.clip.size, as its type is clip_score"),
    ],
)
def test_a_setting_without_effect_is_named(override, said):
    found = config()
    found.update_from_flattened_dict(override)
    with pytest.warns(UserWarning, match=f"^no effect: .*{said}"):
        config_check.check_config(found)


def test_settings_that_have_an_effect_are_not_named():
    found = config()
    found.update_from_flattened_dict(
        GUIDED | {"regularizers.guidance.scale": 7.5, "sampler.eta": 1.0, "lora.alpha": 8.0}
    )
    config_check.check_config(found)


def test_without_regularizers_collapse_is_expected():
    found = config()
    found.regularizers.weight.weight = 0.0
    with pytest.warns(UserWarning, match="no regularizer keeps the generator near"):
        config_check.check_config(found)
    found.regularizers.output.weight = 0.5
    config_check.check_config(found)
