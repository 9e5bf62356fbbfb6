"""R0 beside distillation losses, and R0 without one of its parts, on the embedded world.

Command:   python -m r0_jax.ablate --config=configs/ablations/claims.py --workdir=runs/claims \\
             --out=claims.md
           The variant :parts leaves one part of R0 out at a time; :search measures on validation
           prompts, where settings may be chosen. Both with commas between them.
Hardware:  2 CPU cores, 3 GiB; a quarter of an hour a run, guessed from configs/ablations/shapes.py;
           about an hour for those that keep 25 guided steps.
           --jobs=8 spreads the runs over the GPUs or chips of a host.
Numbers:   none yet. The weights of the distillation losses are guesses: choose them by :search
           before a result of this page is reported.
"""

from ml_collections import ConfigDict

from r0_jax.ablation import grid
from r0_jax.errors import InputError
from r0_jax.shapes import PROMPTS

_NO_REWARDS = ("rewards.clip_score.weight=0", "rewards.preference.weight=0")
_NO_REGULARIZERS = ("regularizers.guidance.weight=0", "regularizers.output.weight=0")
# With the guidance of the recipe, which both teachers have inside.
_CONSISTENCY = (
    "regularizers.consistency.weight=1",
    "regularizers.consistency.least=2",
    "regularizers.consistency.most=2",
    "regularizers.consistency.skip=0.25",  # a step of the generator's four
)
_SCORE = ("regularizers.score.weight=1", "regularizers.score.scale=3")

# Of the relatives that keep the many guided steps of the base. They have no regularizer.
_MANY_STEPS = (
    *_NO_REGULARIZERS,
    "sampler.num_steps=25",
    "sampler.guidance_scale=3",
    "sampler.eta=0",
)

METHODS = {
    "R0": (),
    "R0+": ("objective.method=r0plus",),
    "RG-LCM": ("objective.method=r0plus", *_NO_REGULARIZERS, *_CONSISTENCY),
    "DI++": (*_NO_REGULARIZERS, *_SCORE),
    "score alone": (*_NO_REWARDS, *_NO_REGULARIZERS, *_SCORE),
    "consistency alone": (
        "objective.method=r0plus",
        *_NO_REWARDS,
        *_NO_REGULARIZERS,
        *_CONSISTENCY,
    ),
    "guidance alone": (*_NO_REWARDS, "regularizers.output.weight=0"),
    "rewards alone": _NO_REGULARIZERS,
    "ReFL": (*_MANY_STEPS, "objective.method=refl", "objective.late_steps=6"),
    "DRaFT-1": (*_MANY_STEPS, "objective.grad_steps=1"),
    "DRaFT-LV": (*_MANY_STEPS, "objective.grad_steps=1", "objective.noises=2"),
    "DRTune": (*_MANY_STEPS, "objective.method=drtune", "objective.grad_steps=3"),
}
PARTS = {
    "R0": (),
    "no output": ("regularizers.output.weight=0",),
    "no guidance": ("regularizers.guidance.weight=0",),
    "no fresh noise": ("sampler.eta=0.0",),
    "no preference": ("rewards.preference.weight=0",),
    "no CLIP": ("rewards.clip_score.weight=0",),
    "no normalization": ("objective.normalization=none",),
}
VARIANTS = {"parts", "search"}


def get_config(variants: str = "") -> ConfigDict:
    chosen = set(variants.split(",")) - {""}
    if unknown := chosen - VARIANTS:
        raise InputError(f"variants {sorted(unknown)} are unknown; use parts, search or both")
    named = PARTS if "parts" in chosen else METHODS
    seeds, num_prompts = (0, 1, 2, 3, 4), 1000
    if "search" in chosen:
        seeds, num_prompts = (0, 1, 2), 500
        named = {
            name: (*overrides, f"test.prompts={PROMPTS / 'validation.txt'}")
            for name, overrides in named.items()
        }
    return grid.get_config("configs/shapes_r0.py", named, seeds, num_prompts)
