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
           trained on, yuvalkirstain/PickScore_v1, laion/CLIP-ViT-H-14-laion2B-s32B-b79K and the
           LAION aesthetic head in CLIP-L's folder, where --config.heldout_rewards.NAME.path says.
Hardware:  one accelerator of 24 GB (estimated, not measured), or any number of them: batch_size
           must be a multiple of the devices (data x fsdp). docs/reports/scale.md has plans for TPU
           slices.
Memory:    estimated from parameter counts. Frozen, bfloat16: UNet 1.7 GB, VAE and text 0.4 GB,
           HPS 1.3 GB, ImageReward 0.9 GB, CLIP-L 0.6 GB (the text towers' features are computed
           before), one held-out judge at a time, 1.3 GB, in evaluations only: 6 GB. Adapters of
           rank 64: 27 M parameters x 16 bytes (float32: parameter, EMA, two moments): 0.4 GB.
           Activations of 4 images: about 2 GB an image, nearly all of it the VAE's decoder at
           512 px.
           With --config.objective.decoder=models/taesd (madebyollin/taesd) that is far less.
           :full adds 0.86 G parameters x 20 bytes (the gradient too) = 17 GB: shard it with
           --config.mesh.data=1 --config.mesh.fsdp=-1.
Hours:     not measured; 1.8 on one H100 by this count: an image and step is 19.8 TFLOP (counted in
           the step's jaxpr, as `plan` does), and 128,000 of them at 40 % of its 989 TFLOP/s.
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
