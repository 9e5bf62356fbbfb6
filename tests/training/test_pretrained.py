"""What a run loads before it trains."""

import pytest

from configs import sd15_r0
from r0_jax.config import reward_entry
from r0_jax.errors import InputError
from r0_jax.pipelines import families
from r0_jax.prompts.text import TextPrompts
from r0_jax.rewards import plugin
from r0_jax.stand_ins import miniature_reward
from r0_jax.training import pretrained


def test_a_users_function_is_tried_before_training_and_our_own_rewards_are_not(
    tmp_path, monkeypatch
):
    """At full size that would take minutes on a CPU, at each start."""
    tried = []
    check = plugin.check
    monkeypatch.setattr(
        plugin, "check", lambda reward, *rest: tried.append(reward.name) or check(reward, *rest)
    )
    miniature_reward.write_reward(tmp_path / "clip", "clip_score")
    (tmp_path / "users_own.py").write_text("def f(images, features):\n    return images.sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = {
        "clip": reward_entry("clip_score", path=str(tmp_path / "clip")),
        "sum": reward_entry("function", function="users_own:f"),
    }
    config = sd15_r0.get_config("dryrun")
    pipeline = families.load(config.pretrained, text=False, images=False)
    with pytest.raises(InputError, match="reward sum returns"):
        pretrained.load_rewards(entries, pipeline, config, TextPrompts(), trained=True)
    assert tried == ["sum"]
