"""Diff-Instruct++ (arXiv 2410.18881) beside R0: rewards and an integral KL, on any model family.

Command:   python -m r0_jax.main --config=configs/di_plus_plus.py:sdxl --workdir=runs/di \\
             --config.pretrained=/path/to/stable-diffusion-xl-base-1.0 \\
             --config.data.prompts=prompts.txt
Variants:  a family (sd15, sdxl, sd3, sd35, z_image, taiyi), and those of its own recipe with commas
           between: di_plus_plus.py:sdxl,dryrun. Without a family it is sd15.
Weights:   those of the family's recipe, configs/FAMILY_r0.py.
Memory:    as the family's recipe, and 12 bytes for each parameter of the fake score's adapters
           (float32: parameter, two moments). There is no third network. A step has three more calls
           without gradient, of the guided base and the fake, and trains one call of the fake.
Others:    --config.rewards... weights of 0: Diff-Instruct. --config.regularizers.score.updates=5:
           the two time scales of DMD2, without its GAN. --config.regularizers.score.form=sim:
           Diff-Instruct*.
Differs:   gradients of rewards are normalized, as R0's. Guidance, an implicit reward of the paper,
           is that of R0's recipe. Optimizers are those of TDM-R1, which has a fake of adapters too.
           Rewards, batch and steps are the family's, to compare with R0.
Numbers:   none measured here yet. The paper of R0 reports of SD 1.5 in 4 steps: HPS v2.1 31.83,
           aesthetic 6.09, CLIP score 29.22, ImageReward 0.72.
"""

from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax.variants import apply_variants, of_family


def get_config(variants: str = "") -> ConfigDict:
    config, *others = of_family(variants)
    scale = config.regularizers.guidance.scale
    config.regularizers = base.get_config().regularizers  # none of R0's
    score = config.regularizers.score
    score.weight, score.scale = 1.0, scale
    score.rank, score.targets = config.lora.rank, config.lora.targets
    config.optimizer.learning_rate = 7.5e-5  # the fake's is four times that
    config.optimizer.b1, config.optimizer.b2 = 0.0, 0.999
    return apply_variants(config, *others)
