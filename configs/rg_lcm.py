"""RG-LCM (arXiv 2403.11027) beside R0: rewards and consistency distillation, on any model family.

Command:   python -m r0_jax.main --config=configs/rg_lcm.py:sdxl --workdir=runs/rg_lcm \\
             --config.pretrained=/path/to/stable-diffusion-xl-base-1.0 \\
             --config.data.prompts=prompts.txt
Variants:  a family (sd15, sdxl, sd3, sd35, z_image, taiyi), and those of its own recipe with commas
           between: rg_lcm.py:sdxl,dryrun. Without a family it is sd15.
Weights:   those of the family's recipe, configs/FAMILY_r0.py.
Memory:    as the family's recipe by R0+. A step has three more calls of the network, without
           gradient: the guided base (two in one batch) and the target network.
Differs:   RG-LCM noises real images to 50 levels. There are none here: the noisy input is the
           generator's own, at one of its 4 levels. The step of the teacher, its guidance and the
           loss are the published ones of SDXL with LoRA, where the student is not told w, and so
           is the optimizer. Rewards, batch and steps are the family's, to compare with R0.
Numbers:   none measured here yet. The paper of R0 reports of SD 1.5 in 4 steps: HPS v2.1 31.44,
           aesthetic 6.12, CLIP score 29.14, ImageReward 0.67.
"""

from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax.variants import apply_variants, of_family


def get_config(variants: str = "") -> ConfigDict:
    config, *others = of_family(variants)
    config.objective.method = "r0plus"  # rewards one-shot predictions
    config.regularizers = base.get_config().regularizers  # none of R0's
    config.regularizers.consistency.weight = 1.0
    config.optimizer.learning_rate, config.optimizer.b2 = 1e-4, 0.999
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 500
    return apply_variants(config, *others)
