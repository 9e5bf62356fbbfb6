"""R0 on Stable Diffusion 3 medium, 1024 px: adapters that turn 28 guided steps into 4 plain ones.

Command:   python -m r0_jax.main --config=configs/sd3_r0.py --workdir=runs/sd3 \\
             --config.pretrained=/path/to/stable-diffusion-3-medium-diffusers \\
             --config.data.prompts=prompts.txt
Variants:  sd3_r0.py:r0, :full, :dryrun, or several with commas. It trains by R0+ unless :r0 asks
           for R0, which keeps four calls for the gradient. The dry run needs no weights:
           python -m r0_jax.main --config=configs/sd3_r0.py:dryrun --workdir=runs/dry
Weights:   stabilityai/stable-diffusion-3-medium-diffusers, which is gated: log in on the Hub and
           accept its licence first. text_encoder_3 and tokenizer_3 (T5, 9.5 GB) may be left out:
           its share of the prompt is then zeros, as in stock diffusers. And the reward models of
           sd15_r0.py.
Hardware:  one accelerator of 40 GB (estimated, not measured), or any number of them: batch_size
           must be a multiple of the devices (data x fsdp). docs/reports/scale.md has plans for TPU
           slices.
Memory:    estimated from parameter counts. Frozen, bfloat16: transformer 4.2 GB, VAE 0.2 GB, both
           CLIPs 1.6 GB, T5 9.5 GB if it is there, reward models 4.1 GB: 10 or 20 GB. Adapters of
           rank 64: 84 M parameters x 16 bytes (float32: parameter, EMA, two moments): 1.3 GB.
           Activations of 2 images: about 9 GB an image, most of it the VAE's decoder at 1024 px.
           Prompts encoded before (r0_jax.encode_prompts) spare all three text encoders; with
           --config.objective.decoder=models/taesd3 (madebyollin/taesd3) activations are far fewer.
           :full adds 2.03 G parameters x 20 bytes (the gradient too) = 41 GB: shard it with
           --config.mesh.data=1 --config.mesh.fsdp=-1.
Hours:     not measured; 9.2 on one H100, counted as in sd15_r0.py: an image and step is 102 TFLOP.
Numbers:   none measured here yet. The paper (28 guided steps -> 4 plain ones): HPS v2.1
           31.37 -> 34.04, aesthetic 5.84 -> 6.27, CLIP score 34.13 -> 33.89, ImageReward
           1.07 -> 1.13. r0_jax/published.py says which settings are published, which come from
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
    # Joint attention and feed-forward, of image and text.
    config.lora.targets = (
        r".*\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )
    config.test.base_steps, config.test.guidance_scale = 28, 7.0
    return apply_variants(config, variants, "StableDiffusion3Pipeline")
