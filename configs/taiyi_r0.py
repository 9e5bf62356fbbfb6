"""R0 on Taiyi Stable Diffusion, 512 px: Chinese prompts, read by a BERT of 21128 characters.

Command:   python -m r0_jax.main --config=configs/taiyi_r0.py --workdir=runs/taiyi \\
             --config.pretrained=/path/to/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 \\
             --config.data.prompts=prompts.txt
Variants:  taiyi_r0.py:english, :r0plus, :full, :dryrun, or several with commas. The dry run needs
           no weights:
           python -m r0_jax.main --config=configs/taiyi_r0.py:dryrun --workdir=runs/dry
English:   :english adds HPS v2.1, and PickScore as a held-out judge of another family. Both read
           English, so each line of the prompt files needs a translation in a second field:
             {"prompt": "一只红色的猫", "english": "a red cat"}
           The generator and Chinese-CLIP read the Chinese prompt.
Weights:   IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 in diffusers' format. Its weights are
           published as pickles, which are never read here: once, with PyTorch and diffusers,
             pipe = StableDiffusionPipeline.from_pretrained(hub_name, safety_checker=None)
             pipe.save_pretrained(folder)
           writes the folder with safetensors. The rewards are Chinese-CLIP ViT-L/14 and the LAION
           aesthetic predictor, and Chinese-CLIP ViT-H/14 is never trained on. All three are made
           by `python -m r0_jax.convert_reward` (docs/rewards.md) of clip_cn_vit-l-14.pt,
           sac+logos+ava1-l14-linearMSE.pth into the folder of openai/clip-vit-large-patch14, and
           clip_cn_vit-h-14.pt, under models/ or where --config.rewards.NAME.path and
           --config.heldout_rewards.heldout_chinese_clip.path say.
Hardware:  one accelerator of 24 GB (estimated, not measured), as sd15_r0.py.
Memory:    estimated from parameter counts: as sd15_r0.py, but reward models 2.5 GB (Chinese-CLIP
           0.6, of the held-out one 1.3 in evaluations, CLIP-L 0.6): 4 GB; prompts are 512 tokens
           here, not 77.
Hours:     not measured; about 1.8 on one H100, as sd15_r0.py.
Numbers:   none measured here, and the paper has none. English rewards cannot judge a Chinese
           prompt; Chinese-CLIP can, and so can one of your own (type "function"). The weight and
           the cap of HPS v2.1 are those of the other recipes.
"""

from ml_collections import ConfigDict

from r0_jax import published
from r0_jax.config import reward_entry
from r0_jax.variants import apply_variants


def get_config(variants: str = "") -> ConfigDict:
    chosen = variants.split(",")
    config = published.get_config()
    config.family = "StableDiffusionPipeline"
    of_english = config.rewards.hps_v2_1, config.heldout_rewards.pickscore
    with config.unlocked():
        config.rewards = ConfigDict(
            {
                "chinese_clip": reward_entry("chinese_clip", path="models/clip_cn_vit-l-14"),
                "aesthetic": reward_entry("aesthetic", path="models/clip-vit-large-patch14"),
            }
        )
        config.heldout_rewards = ConfigDict(
            {"heldout_chinese_clip": reward_entry("chinese_clip", path="models/clip_cn_vit-h-14")}
        )
        if "english" in chosen:
            config.rewards.hps_v2_1, config.heldout_rewards.pickscore = of_english
            for entry in of_english:
                entry.reads = "english"
    config.best_metric = "heldout/heldout_chinese_clip"
    config.device_batch = 4
    config.regularizers.guidance.scale = 7.5
    config.test.guidance_scale = 7.5
    others = ",".join(name for name in chosen if name != "english")
    return apply_variants(config, others, "Taiyi")
