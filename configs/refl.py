"""ReFL (arXiv 2304.05977) beside R0: rewards on a late step of a guided many-step sampler.

Command:   python -m r0_jax.main --config=configs/refl.py:sd35 --workdir=runs/refl \\
             --config.pretrained=/path/to/stable-diffusion-3.5-medium \\
             --config.data.prompts=prompts.txt
Variants:  a family (sd15, sdxl, sd3, sd35, z_image, taiyi), and those of its own recipe with commas
           between: refl.py:sdxl,dryrun. Without a family it is sd15.
Weights:   those of the family's recipe, configs/FAMILY_r0.py.
Memory:    as the family's recipe by R0+, with two images in the place of one in the network: a
           guided step calls it with and without the prompt.
Result:    a generator of 40 guided steps, not of 4. It needs 80 network calls an image.
Published: ReFL runs 40 steps without gradient to one of the last 10, and rewards its prediction;
           learning rate 1e-5, AdamW. FlowBP (2606.11075) trains SD 3.5 medium so: one of the last
           11 of 25 steps at guidance 3.5, 300 steps of 64 images, learning rate 1e-5, all weights,
           EMA 0.995. The steps, batch and EMA here are FlowBP's.
Differs:   gradients of rewards are normalized, as R0's. ReFL's code has no regularizer, its paper
           trains on images besides; here the weights are pulled to the pretrained ones. Learning
           rates are those of the family's recipe, of adapters and of :full.
Numbers:   none measured here yet. FlowBP's paper has its own of SD 3.5 medium.
"""

from ml_collections import ConfigDict

from r0_jax.variants import apply_variants, many_steps


def get_config(variants: str = "") -> ConfigDict:
    config, *others = many_steps(variants, num_steps=40)
    config.objective.method, config.objective.late_steps = "refl", 10
    return apply_variants(config, *others)
