"""R0 on Stable Diffusion 1.5, 512 px: adapters that turn 25 guided steps into 4 plain ones.

Command:   python -m r0_jax.main --config=configs/sd15_r0.py --workdir=runs/sd15 \\
             --config.pretrained=/path/to/stable-diffusion-v1-5 --config.data.prompts=prompts.txt
Variants:  sd15_r0.py:r0plus, :full, :dryrun, or several with commas. The dry run needs no weights:
           python -m r0_jax.main --config=configs/sd15_r0.py:dryrun --workdir=runs/dry
Weights:   stable-diffusion-v1-5 in diffusers' format (any fine-tune of it will do; the paper
           trains Realistic-Vision); for the rewards openai/clip-vit-large-patch14,
           yuvalkirstain/PickScore_v1 and, never trained on, laion/CLIP-ViT-H-14-laion2B-s32B-b79K
           in transformers' format, under models/ or where --config.rewards.clip_score.path,
           --config.rewards.pickscore.path and --config.heldout_rewards.heldout_clip.path say.
Hardware:  one accelerator of 24 GB (estimated, not measured), or any number of them: batch_size
           must be a multiple of devices x accumulation.
Memory:    estimated from parameter counts. Frozen, bfloat16: UNet 1.7 GB, VAE and text 0.4 GB,
           CLIP-L 0.9 GB, PickScore and the judge 2.0 GB each: 7 GB. Adapters of rank 32: 6.4 M
           parameters x 16 bytes (float32: parameter, EMA, two moments): 0.1 GB. Activations of
           4 images: about 2 GB an image, nearly all of it the VAE's decoder at 512 px.
           :full adds 0.86 G parameters x 20 bytes (the gradient too) = 17 GB: shard it with
           --config.mesh.data=1 --config.mesh.fsdp=-1.
Hours:     not measured. Per image and step, forward passes: UNet 4 x 0.8, decoder 2.5 TFLOP;
           backward about twice that, and the UNet once more as it is rematerialized.
Numbers:   none measured here yet. The paper (25 guided steps -> 4 plain ones, Realistic-Vision):
           HPS v2.1 30.19 -> 33.70, aesthetic 5.87 -> 6.11, CLIP score 34.28 -> 32.13,
           ImageReward 0.81 -> 1.22. Weights of regularizers are those found on the embedded world
           (shapes_r0.py) and in sibling code, not searched at this size.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variants: str = "") -> ConfigDict:
    config = common.get_config()
    config.family = "StableDiffusionPipeline"
    config.dtype = "bfloat16"
    with config.unlocked():
        config.rewards.clip_score = common.reward_entry(
            "clip_score", path="models/clip-vit-large-patch14")
        config.rewards.pickscore = common.reward_entry(
            "clip_score", path="models/PickScore_v1", logit_scale=True)
        config.heldout_rewards.heldout_clip = common.reward_entry(
            "clip_score", path="models/CLIP-ViT-H-14-laion2B-s32B-b79K")
    config.best_metric = "heldout/heldout_clip"
    config.regularizers.weight.weight = 1e-4
    config.regularizers.guidance.weight = 0.3
    config.regularizers.guidance.scale = 4.5

    config.steps = 1000
    config.batch_size = 32
    config.accumulation = 8
    # TDM-R1's adapters, of the same authors: rank 32, alpha 64, learning rate 3e-4.
    config.lora.rank, config.lora.alpha = 32, 64.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 50
    config.test.base_steps, config.test.guidance_scale = 25, 7.5
    config.test.batch_size = 8
    return common.apply_variants(config, variants, "StableDiffusionPipeline")
