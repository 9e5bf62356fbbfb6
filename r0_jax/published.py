"""What the recipes of published models share: rewards, regularizers and adapters.

A recipe of your own may begin with it too: `config = r0_jax.published.get_config()`.
"""

from ml_collections import ConfigDict

from r0_jax import config as base


def get_config() -> ConfigDict:
    """Return the config of a published model in bfloat16, locked: 1000 steps of 32 images.

    `pretrained` and `data.prompts` are "", and `family` is any.
    """
    config = base.get_config()
    config.dtype = "bfloat16"
    config.attention = "auto"
    config.remat, config.scan_blocks = "blocks", True
    with config.unlocked():
        # The paper's three. Each has weight 1, since gradients are normalized one by one: weights
        # that others give to raw scores (ReNO: 5, 1 and 0.01) would not mean the same.
        config.rewards.hps_v2_1 = base.reward_entry("hps_v2_1", path="models/hps_v2_1")
        config.rewards.image_reward = base.reward_entry("image_reward", path="models/image_reward")
        config.rewards.clip_score = base.reward_entry(
            "clip_score", path="models/clip-vit-large-patch14"
        )
        config.heldout_rewards.pickscore = base.reward_entry(
            "pickscore", path="models/PickScore_v1"
        )
    config.best_metric = "heldout/pickscore"
    config.regularizers.weight.weight = 1e-4
    config.regularizers.guidance.weight = 0.3
    config.regularizers.guidance.scale = 4.5

    config.steps = 1000
    config.batch_size = 32
    # TDM-R1's adapters, of the same authors: rank 32, alpha 64, learning rate 3e-4.
    config.lora.rank, config.lora.alpha = 32, 64.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 50
    config.test.base_steps = 25
    return config
