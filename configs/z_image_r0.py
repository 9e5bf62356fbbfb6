"""R0 on Z-Image, 1024 px: adapters that turn 28 guided steps into 4 plain ones.

Command:   python -m r0_jax.main --config=configs/z_image_r0.py --workdir=runs/z_image \\
             --config.pretrained=/path/to/Z-Image --config.data.prompts=prompts.txt
Variants:  z_image_r0.py:r0, :full, :dryrun, or several with commas. It trains by R0+ unless :r0
           asks for R0, which keeps four calls for the gradient. The dry run needs no weights:
           python -m r0_jax.main --config=configs/z_image_r0.py:dryrun --workdir=runs/dry
Weights:   Tongyi-MAI/Z-Image, in float32 or bfloat16, and the reward models of sd15_r0.py.
Turbo:     Tongyi-MAI/Z-Image-Turbo was distilled for 8 steps without guidance, and 4 are fewer.
           Guidance has no meaning for it: add --config.regularizers.guidance.weight=0
           --config.test.base_steps=8 --config.test.guidance_scale=1.
Prompts:   Chinese or English: Qwen3 reads both. The rewards of this recipe read English. For
           Chinese prompts take those of taiyi_r0.py, in a recipe of your own.
Hardware:  one accelerator of 80 GB, or of 40 GB if prompts are encoded before
           (r0_jax.encode_prompts); estimated, not measured. Or any number of them: batch_size must
           be a multiple of the devices (data x fsdp). mesh.tensor may be 2 or 5; 3 splits
           attention only, and 4 the feed-forward only.
Memory:    estimated from parameter counts. Frozen, bfloat16: transformer 12.3 GB, Qwen3 8.0 GB
           unless prompts are encoded before, VAE 0.2 GB, reward models 4.1 GB: 17 or 25 GB.
           Adapters of rank 64: 158 M parameters x 16 bytes (float32: parameter, EMA, two moments):
           2.5 GB. Activations of an image: 1.2 GB of the 34 blocks' inputs, and about 9 GB of the
           VAE's decoder at 1024 px. With --config.objective.decoder=models/taef1
           (madebyollin/taef1) the latter are far fewer.
           :full adds 6.15 G parameters x 20 bytes (the gradient too) = 123 GB: shard it with
           --config.mesh.data=1 --config.mesh.fsdp=-1.
Hours:     not measured; 41 on one H100, counted as in sd15_r0.py: an image and step is 453 TFLOP,
           and 1,043 with :r0. That is with prompts encoded before, of up to 96 tokens; as text each
           fills 512 tokens, and a call of the transformer is 62 TFLOP instead of 56.
Numbers:   none measured here yet, and R0's paper has none of Z-Image. TDM-R1, by the same first
           author (arXiv 2603.07700), reports that 4 calls of Z-Image pass its 100 guided ones on
           all metrics there. r0_jax/published.py says which settings are published, which come
           from the embedded world, and which are guesses.
Guidance:  is uncond + scale (cond - uncond), here as in every recipe. Z-Image's own pipeline calls
           scale - 1 its guidance_scale: 4 there is 5 here, and 0 there is none.
Grid:      sigmas 1, .75, .5, .25 before the folder's shift. That is 6 for Z-Image, i.e. 1, .947,
           .857, .667; and 3 for Turbo, i.e. 1, .9, .75, .5. Stock diffusers from 0.39 on visits
           this grid by itself.
"""

from ml_collections import ConfigDict

from r0_jax import published
from r0_jax.variants import apply_variants


def get_config(variants: str = "") -> ConfigDict:
    config = published.get_config()
    config.family = "ZImagePipeline"
    config.height = config.width = 1024  # which no file of Z-Image says
    config.device_batch = 1
    config.objective.method = "r0plus"  # a gradient through one call: a quarter of the memory
    # Attention and feed-forward of all 34 blocks.
    config.lora.targets = r".*\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
    config.test.base_steps, config.test.guidance_scale = 28, 5.0
    return apply_variants(config, variants, "ZImagePipeline")
