"""What the recipes of published models share: rewards, regularizers and adapters.

A recipe of your own may begin with it too: `config = r0_jax.published.get_config()`.
"""

from ml_collections import ConfigDict

from r0_jax import config as base


def get_config() -> ConfigDict:
    """Return the config of a published model in bfloat16, locked: 2000 steps of 64 images.

    `pretrained` and `data.prompts` are "", and `family` is any. No value was searched at this size.
    Published: adapters of rank 64 on all linear layers at 1e-4 (LCM-LoRA and Hyper-SD, which make
    four steps of many too; TDM-R1, by the authors of R0, takes rank 32 on attention and 7.5e-5, but
    starts from four steps); guidance 4.5 (SD3) to 7.5 (SD 1.5). From the embedded world: the forms
    of `guidance` and `output`, which are shares of the rewards' pull. Guessed: these shares,
    `weight`, the caps, the veto and the steps.
    """
    config = base.get_config()
    config.dtype = "bfloat16"
    config.attention = "auto"
    config.remat, config.scan_blocks = "blocks", True
    with config.unlocked():
        # The paper's three. Gradients are normalized one by one, so weights that others give to raw
        # scores (ReNO: 5, 1 and 0.01) would not mean the same. CLIP pulls less than the preference
        # models: alone it paints the prompt's words into the image.
        # A cap is what only images that hack the reward exceed.
        config.rewards.hps_v2_1 = base.reward_entry("hps_v2_1", path="models/hps_v2_1", cap=0.4)
        config.rewards.image_reward = base.reward_entry(
            "image_reward", path="models/image_reward", cap=1.9
        )
        config.rewards.clip_score = base.reward_entry(
            "clip_score", path="models/clip-vit-large-patch14", weight=0.5, cap=0.36
        )
        # Of three lineages: people's choices, people's marks for beauty, and pairs of the web.
        config.heldout_rewards.pickscore = base.reward_entry(
            "pickscore", path="models/PickScore_v1"
        )
        config.heldout_rewards.aesthetic = base.reward_entry(
            "aesthetic", path="models/clip-vit-large-patch14"
        )
        config.heldout_rewards.heldout_clip = base.reward_entry(
            "clip_score", path="models/CLIP-ViT-H-14-laion2B-s32B-b79K"
        )
        # Wide: four plain steps of the base are blurred and pale, so good images differ too.
        config.veto = ConfigDict(
            {
                "saturation": (0.5, 2.0),
                "contrast": (0.5, 2.0),
                "edges": (0.4, 4.0),
                "dark": (0.0, 8.0),
                "colour_entropy": (0.6, 1.8),
                "diversity": (0.6, 2.0),
            }
        )
    config.best_metric = "heldout/pickscore"
    config.regularizers.weight.weight = 0.05
    config.regularizers.output.weight = 0.3
    config.regularizers.guidance.weight, config.regularizers.guidance.scale = 0.7, 4.5
    config.regularizers.guidance.least, config.regularizers.guidance.most = 0.1, 0.7

    config.steps = 2000
    config.batch_size = 64
    config.checkpoint_every = config.eval_every = 25
    config.early_stop = 20  # evaluations: 500 steps without a new best
    config.lora.rank, config.lora.alpha = 64, 64.0
    # Of a UNet's transformers: attention, feed-forward, and the way in and out.
    config.lora.targets = r".*\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out))"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.test.base_steps = 25
    return config
