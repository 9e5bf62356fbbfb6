"""The recipe and `r0_jax.evaluate --pipeline` measure the world in the same way."""

from configs import shapes_r0
from r0_jax import config as base
from r0_jax.evaluation import testbed
from r0_jax.shapes import PROMPTS
from r0_jax.shapes.measures import set_measures


def test_a_config_is_measured_as_the_recipe_is():
    config, recipe = base.get_config(), shapes_r0.get_config()
    set_measures(config)
    for section in ("test", "rewards", "heldout_rewards"):
        assert config[section] == recipe[section], section
    assert config.is_locked and config.test.world == "shapes"
    assert config.test.prompts == str(PROMPTS / "test.txt")
    testbed.check(config.test, config.heldout_rewards)  # raises unless its features are measured
