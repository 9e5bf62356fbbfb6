"""DRaFT (arXiv 2309.17400) beside R0: gradients through the last steps of a guided sampler.

Command:   python -m r0_jax.main --config=configs/draft.py:sd15 --workdir=runs/draft \\
             --config.pretrained=/path/to/stable-diffusion-v1-5 --config.data.prompts=prompts.txt
Variants:  a family (sd15, sdxl, sd3, sd35, z_image, taiyi), and those of its own recipe with commas
           between: draft.py:sdxl,dryrun. Without a family it is sd15.
Weights:   those of the family's recipe, configs/FAMILY_r0.py.
Memory:    as the family's recipe by R0+, with two images in the place of one in the network: a
           guided step calls it with and without the prompt. The gradient is that of the last step.
Others:    --config.objective.grad_steps=K: DRaFT-K, with K latents more.
           --config.objective.noises=2: DRaFT-LV, with three images in the place of one.
           --config.objective.method=drtune --config.objective.grad_steps=3
           --config.objective.late_steps=20: DRTune (arXiv 2405.00760), as FlowBP sets it.
Result:    a generator of 50 guided steps, not of 4. It needs 100 network calls an image.
Published: SD 1.4, 50 steps at guidance 7.5, K = 1, LoRA, AdamW of b2 0.999 and weight decay 0.1
           [from memory of the paper, whose code was never released]. FlowBP (2606.11075) trains SD
           3.5 medium by DRaFT-LV and DRTune: 25 steps at guidance 3.5, 300 steps of 64 images,
           learning rate 1e-5, all weights, EMA 0.995. Batch, steps and EMA here are FlowBP's.
Differs:   gradients of rewards are normalized, as R0's, and the weights are pulled to the
           pretrained ones. Learning rates are those of the family's recipe, of adapters and of
           :full.
Numbers:   none measured here yet.
"""

from ml_collections import ConfigDict

from r0_jax.variants import apply_variants, many_steps


def get_config(variants: str = "") -> ConfigDict:
    config, *others = many_steps(variants, num_steps=50)
    config.objective.method, config.objective.grad_steps = "r0", 1
    return apply_variants(config, *others)
