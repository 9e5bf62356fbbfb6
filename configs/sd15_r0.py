"""R0 on Stable Diffusion 1.5, 512 px: adapters that turn 25 guided steps into 4 plain ones.

Command:   python -m r0_jax.main --config=configs/sd15_r0.py --workdir=runs/sd15 \\
             --config.pretrained=/path/to/stable-diffusion-v1-5 --config.data.prompts=prompts.txt
Variants:  sd15_r0.py:r0plus, :full, :dryrun, or several with commas. The dry run needs no weights:
           python -m r0_jax.main --config=configs/sd15_r0.py:dryrun --workdir=runs/dry
Weights:   stable-diffusion-v1-5 in diffusers' format (any fine-tune of it will do; the paper
           trains Realistic-Vision). The paper's rewards, each under models/ or where
           --config.rewards.NAME.path says: hps_v2_1 and image_reward as made by
           `python -m r0_jax.convert_reward` of HPS_v2.1_compressed.pt and ImageReward.pt
           (docs/rewards.md), clip_score openai/clip-vit-large-patch14 as published; and, never
           trained on, --config.heldout_rewards.pickscore.path, yuvalkirstain/PickScore_v1.
Hardware:  one accelerator of 24 GB (estimated, not measured), or any number of them: batch_size
           must be a multiple of the devices (data x fsdp). docs/reports/scale.md has plans for TPU
           slices.
Memory:    estimated from parameter counts. Frozen, bfloat16: UNet 1.7 GB, VAE and text 0.4 GB,
           HPS 1.3 GB, ImageReward 0.9 GB, CLIP-L 0.6 GB (the text towers' features are computed
           before), PickScore 1.3 GB, in evaluations only: 6 GB. Adapters of rank 32: 6.4 M
           parameters x 16 bytes (float32: parameter, EMA, two moments): 0.1 GB.
           Activations of 4 images: about 2 GB an image, nearly all of it the VAE's decoder at
           512 px.
           With --config.objective.decoder=models/taesd (madebyollin/taesd) that is far less.
           :full adds 0.86 G parameters x 20 bytes (the gradient too) = 17 GB: shard it with
           --config.mesh.data=1 --config.mesh.fsdp=-1.
Hours:     not measured; about half an hour on one H100 by this count: an image and step is 24
           TFLOP, and 32,000 of them at 40 % of its 989 TFLOP/s take 0.5 h. Of the 24, the UNet's
           four calls are 13 (0.8 each; again as they are rematerialized, and twice for the
           gradient), guidance 1.6, the decoder 7.5, the rewards 1.7.
Numbers:   none measured here yet. The paper (25 guided steps -> 4 plain ones, Realistic-Vision):
           HPS v2.1 30.19 -> 33.70, aesthetic 5.87 -> 6.11, CLIP score 34.28 -> 32.13,
           ImageReward 0.81 -> 1.22. r0_jax/published.py says which settings are published, which
           come from the embedded world, and which are guesses.
"""

from ml_collections import ConfigDict

from r0_jax import published
from r0_jax.variants import apply_variants


def get_config(variants: str = "") -> ConfigDict:
    config = published.get_config()
    config.family = "StableDiffusionPipeline"
    config.device_batch = 4
    config.regularizers.guidance.scale = 7.5
    config.test.guidance_scale = 7.5
    return apply_variants(config, variants, "StableDiffusionPipeline")
