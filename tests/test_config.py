"""The base of all recipes."""

import importlib
import sys

import pytest
from ml_collections import ConfigDict

from r0_jax import config as base


def test_every_field_that_holds_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = base.get_config()
    with config.unlocked():
        for section in ("rewards", "heldout_rewards"):
            config[section] = ConfigDict({"one": base.reward_entry("clip_score")})
    for field in base.PATHS:
        set_field(config, field, "~/x")
    config.rewards.one.path, config.heldout_rewards.one.head = "models/a", "gs://b/head"
    config.rewards.one.function = "module:function"
    base.make_paths_absolute(config)
    assert {get_field(config, field) for field in base.PATHS} == {"/home/me/x"}
    assert config.rewards.one.path == f"{tmp_path}/models/a"
    assert config.heldout_rewards.one.head == "gs://b/head"
    assert config.rewards.one.function == "module:function"
    assert (config.rewards.one.head, config.heldout_rewards.one.path) == ("", "")
    assert config.is_locked and (config.dtype, config.attention) == ("float32", "xla")


def test_a_config_of_other_fields_stays():
    config = ConfigDict({"stage": "vae", "network": {"path": "x"}, "data": 3, "pretrained": None})
    before = config.to_dict()
    base.make_paths_absolute(config)
    assert config.to_dict() == before


def test_recipes_of_the_first_version_find_it_under_its_old_name():
    sys.modules.pop("configs.common", None)
    with pytest.warns(UserWarning, match="write `from r0_jax import config as common`"):
        common = importlib.import_module("configs.common")
    assert (common.get_config, common.reward_entry) == (base.get_config, base.reward_entry)


def get_field(config, field):
    for name in field.split("."):
        config = config[name]
    return config


def set_field(config, field, value):
    *sections, last = field.split(".")
    for name in sections:
        config = config[name]
    config[last] = value
