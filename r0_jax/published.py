"""What the recipes of published models share: rewards, regularizers and adapters.

A recipe of your own may begin with it too: `config = r0_jax.published.get_config()`.
"""

from ml_collections import ConfigDict

from r0_jax import config as base


def get_config() -> ConfigDict:
    """Return the config of a published model in bfloat16, locked: 1000 steps of 32 images.

    `pretrained` and `data.prompts` are "", and `family` is any. No value was searched at this size.
    Published: adapters of rank 32 and alpha 64 at 7.5e-5 (the generator of TDM-R1, by the same
    authors); guidance 4.5 (SD3) to 7.5 (SD 1.5). From the embedded world: the forms of `guidance`
    and `output`, which are shares of the rewards' pull. Guessed: the shares, `weight`, the steps.
    """
    config = base.get_config()
    config.dtype = "bfloat16"
    config.attention = "auto"
    config.remat, config.scan_blocks = "blocks", True
    with config.unlocked():
        # The paper's three. Gradients are normalized one by one, so weights that others give to raw
        # scores (ReNO: 5, 1 and 0.01) would not mean the same. CLIP pulls less than the preference
        # models: alone it paints the prompt's words into the image.
        config.rewards.hps_v2_1 = base.reward_entry("hps_v2_1", path="models/hps_v2_1")
        config.rewards.image_reward = base.reward_entry("image_reward", path="models/image_reward")
        config.rewards.clip_score = base.reward_entry(
            "clip_score", path="models/clip-vit-large-patch14", weight=0.5
        )
        config.heldout_rewards.pickscore = base.reward_entry(
            "pickscore", path="models/PickScore_v1"
        )
    config.best_metric = "heldout/pickscore"
    config.regularizers.weight.weight = 0.05
    config.regularizers.output.weight = 0.3
    config.regularizers.guidance.weight, config.regularizers.guidance.scale = 0.7, 4.5
    config.regularizers.guidance.least, config.regularizers.guidance.most = 0.1, 0.7

    config.steps = 1000
    config.batch_size = 32
    config.checkpoint_every = config.eval_every = 25
    config.early_stop = 20  # evaluations: 500 steps without a new best
    config.lora.rank, config.lora.alpha = 32, 64.0
    config.optimizer.learning_rate = 7.5e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.test.base_steps = 25
    return config
