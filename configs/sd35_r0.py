"""R0 on Stable Diffusion 3.5 medium, 1024 px: adapters that turn 40 guided steps into 4 plain ones.

Command:   python -m r0_jax.main --config=configs/sd35_r0.py --workdir=runs/sd35 \\
             --config.pretrained=/path/to/stable-diffusion-3.5-medium \\
             --config.data.prompts=prompts.txt
Variants:  sd35_r0.py:r0, :full, :dryrun, or several with commas, as sd3_r0.py. The dry run needs no
           weights:
           python -m r0_jax.main --config=configs/sd35_r0.py:dryrun --workdir=runs/dry
Weights:   stabilityai/stable-diffusion-3.5-medium, which is gated: log in on the Hub and accept its
           licence first. T5 may be left out, as in sd3_r0.py. And the reward models of sd15_r0.py.
Hardware:  as sd3_r0.py, for a transformer of 2.24 G parameters instead of 2.03 G: one accelerator
           of 40 GB (estimated, not measured), or any number of them.
Memory:    estimated: 0.4 GB more than sd3_r0.py. At 512 px (--config.height=512
           --config.width=512), where this year's peers train, activations are a quarter.
Plan:      without the weights `python -m r0_jax.plan` takes the sizes of SD3 medium; with them it
           takes their own.
Numbers:   none measured here yet. A peer (FlowBP, 512 px) takes 1e-5 for all weights and 300 steps
           of 64 images. r0_jax/published.py says which settings are published, which come from
           the embedded world, and which are guesses.
Grid:      sigmas 1, .75, .5, .25 before the folder's shift of 3, i.e. 1, .9, .75, .5.
"""

from ml_collections import ConfigDict

from r0_jax import published
from r0_jax.variants import apply_variants


def get_config(variants: str = "") -> ConfigDict:
    config = published.get_config()
    config.family = "StableDiffusion3Pipeline"
    config.device_batch = 2
    config.objective.method = "r0plus"  # a gradient through one call: a quarter of the memory
    # As sd3_r0.py, and the image's own attention in the first 13 blocks.
    config.lora.targets = (
        r".*\.(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )
    config.test.base_steps, config.test.guidance_scale = 40, 4.5
    return apply_variants(config, variants, "StableDiffusion3.5")
