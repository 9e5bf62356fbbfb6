"""R0 on SDXL base 1.0, 1024 px: adapters that turn 25 guided steps into 4 plain ones.

Command:   python -m r0_jax.main --config=configs/sdxl_r0.py --workdir=runs/sdxl \\
             --config.pretrained=/path/to/stable-diffusion-xl-base-1.0 \\
             --config.data.prompts=prompts.txt
Variants:  sdxl_r0.py:r0, :full, :dryrun, or several with commas. It trains by R0+ unless :r0 asks
           for R0, which keeps four calls for the gradient. The dry run needs no weights:
           python -m r0_jax.main --config=configs/sdxl_r0.py:dryrun --workdir=runs/dry
Weights:   stabilityai/stable-diffusion-xl-base-1.0 in diffusers' format (fp16 files will do), and
           the reward models of sd15_r0.py.
Hardware:  one accelerator of 40 GB (estimated, not measured), or any number of them: batch_size
           must be a multiple of the devices (data x fsdp). On TPUs, planned and not run: a chip of
           v5e-16 needs --config.mesh.data=1 --config.mesh.fsdp=16 --config.device_batch=1; see
           docs/reports/scale.md, and
           `python -m r0_jax.plan --config=configs/sdxl_r0.py --topology=v5e-16`.
Memory:    estimated from parameter counts. Frozen, bfloat16: UNet 5.1 GB, VAE 0.2 GB, text
           encoders 1.6 GB, reward models 4.1 GB: 11 GB. Adapters of rank 64: 170 M parameters x
           16 bytes (float32: parameter, EMA, two moments): 2.7 GB. Activations of 2 images: about
           6 GB an image (planned), most of it the VAE's decoder at 1024 px, four times that at
           512 px.
           With --config.objective.decoder=models/taesdxl (madebyollin/taesdxl) that is far less.
           :full adds 2.57 G parameters x 20 bytes (the gradient too) = 51 GB: shard it with
           --config.mesh.data=1 --config.mesh.fsdp=-1 (v5p-8, 4 chips: 20.8 GiB each, planned).
Hours:     not measured; 7.1 on one H100, counted as in sd15_r0.py: an image and step is 79 TFLOP.
Numbers:   none measured here yet, and the paper has none of SDXL. r0_jax/published.py says which
           settings are published, which come from the embedded world, and which are guesses.
"""

from ml_collections import ConfigDict

from r0_jax import published
from r0_jax.variants import apply_variants


def get_config(variants: str = "") -> ConfigDict:
    config = published.get_config()
    config.family = "StableDiffusionXLPipeline"
    config.device_batch = 2
    config.objective.method = "r0plus"  # a gradient through one call: a quarter of the memory
    config.test.guidance_scale = 5.0
    return apply_variants(config, variants, "StableDiffusionXLPipeline")
