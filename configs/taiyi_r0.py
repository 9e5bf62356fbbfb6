"""R0 on Taiyi Stable Diffusion, 512 px: Chinese prompts, read by a BERT of 21128 characters.

Command:   python -m r0_jax.main --config=configs/taiyi_r0.py --workdir=runs/taiyi \\
             --config.pretrained=/path/to/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 \\
             --config.data.prompts=prompts.txt
Variants:  taiyi_r0.py:r0plus, :full, :dryrun, or several with commas. The dry run needs no weights:
           python -m r0_jax.main --config=configs/taiyi_r0.py:dryrun --workdir=runs/dry
Weights:   IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 in diffusers' format. Its weights are
           published as pickles, which are never read here: once, with PyTorch and diffusers,
             pipe = StableDiffusionPipeline.from_pretrained(hub_name, safety_checker=None)
             pipe.save_pretrained(folder)
           writes the folder with safetensors. The reward is the LAION aesthetic predictor:
           openai/clip-vit-large-patch14 and its head as safetensors, under models/.
Hardware:  one accelerator of 24 GB (estimated, not measured), as sd15_r0.py.
Memory:    estimated: as sd15_r0.py without PickScore; prompts are 512 tokens here, not 77.
Hours:     not measured.
Numbers:   none measured here, and the paper has none. English CLIPs cannot judge a Chinese prompt:
           what ties the image to it is guidance, as an implicit reward, so its weight is larger
           here. A reward that reads Chinese is better where you have one (type "function").
"""

from ml_collections import ConfigDict

from configs import common, sd15_r0


def get_config(variants: str = "") -> ConfigDict:
    config = sd15_r0.get_config()
    clip, head = "models/clip-vit-large-patch14", "models/aesthetic/model.safetensors"
    with config.unlocked():
        config.rewards = ConfigDict(
            {"aesthetic": common.reward_entry("aesthetic", path=clip, head=head)})
        config.heldout_rewards = ConfigDict()
    config.best_metric = ""
    config.regularizers.guidance.weight = 1.0
    return common.apply_variants(config, variants, "Taiyi")
