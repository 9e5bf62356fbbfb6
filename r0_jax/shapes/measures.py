"""What scores images of the embedded world: its rewards, the held-out ones, and its test."""

from ml_collections import ConfigDict

from r0_jax.config import reward_entry
from r0_jax.shapes import CHECKPOINTS, PROMPTS


def set_measures(config: ConfigDict) -> None:
    """Set `rewards`, `heldout_rewards` and `test` of a config to those of the embedded world."""
    preference = str(CHECKPOINTS / "preference")
    with config.unlocked():
        config.rewards.clip_score = reward_entry("clip_score", path=str(CHECKPOINTS / "clip"))
        config.rewards.preference = reward_entry("clip_score", path=preference)
        # Only measured, and a judge of the preference model's own features.
        config.heldout_rewards.aesthetic = reward_entry(
            "aesthetic",
            path=preference,
            head=str(CHECKPOINTS / "aesthetic" / "model.safetensors"),
        )
        config.heldout_rewards.heldout_clip = reward_entry(
            "clip_score", path=str(CHECKPOINTS / "heldout_clip")
        )
    config.test.prompts = str(PROMPTS / "test.txt")
    config.test.guidance_scale = 3.0
    config.test.features = "heldout_clip"
    config.test.world = "shapes"
