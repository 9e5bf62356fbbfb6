"""Variants of a recipe: what stands after the colon of --config=FILE.py:r0plus,full,dryrun."""

from ml_collections import ConfigDict

from r0_jax import cli
from r0_jax import config as base
from r0_jax.errors import InputError

# Families with a recipe, and what their dry runs train, in r0_jax/stand_ins/miniature.py.
FAMILIES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35": "StableDiffusion3.5",
    "z_image": "ZImagePipeline",
    "taiyi": "Taiyi",
}
VARIANTS = ("r0", "r0plus", "full", "dryrun")


def of_family(variants: str) -> tuple[ConfigDict, str, str]:
    """Return the config of a family's own recipe, and the other arguments of `apply_variants`.

    For recipes of another method, of whose variants one is a family: rg_lcm.py:sdxl,dryrun. Without
    one it is Stable Diffusion 1.5. Raises InputError for two families or an unknown variant.
    """
    chosen = variants.split(",") if variants else []
    families = [name for name in chosen if name in FAMILIES]
    for name in chosen:
        if name not in (*FAMILIES, *VARIANTS):
            raise InputError(
                f"variant {name!r} is unknown; known: a family ({', '.join(FAMILIES)}) and "
                f"{', '.join(VARIANTS)}"
            )
    if len(families) > 1:
        raise InputError(f"variants {' and '.join(families)} are two families: give one of them")
    family = families[0] if families else "sd15"
    others = ",".join(name for name in chosen if name not in FAMILIES)
    return cli.read_config(f"configs/{family}_r0.py"), others, FAMILIES[family]


def many_steps(variants: str, num_steps: int) -> tuple[ConfigDict, str, str]:
    """Return what `of_family` does, with the settings of relatives that keep many guided steps.

    The sampler takes `num_steps` at the guidance of the family's base. Of R0's regularizers the
    pull to the pretrained weights stays. Batch, steps and average are those of FlowBP
    (arXiv 2606.11075).
    """
    config, *others = of_family(variants)
    config.sampler.num_steps = num_steps
    config.sampler.guidance_scale = config.test.guidance_scale
    config.sampler.random_eta = False
    config.test.base_steps = num_steps
    weight = config.regularizers.weight.weight
    config.regularizers = base.get_config().regularizers
    config.regularizers.weight.weight = weight
    config.steps, config.batch_size, config.ema_decay = 300, 64, 0.995
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 10
    return config, *others


def apply_variants(config: ConfigDict, variants: str, miniature: str) -> ConfigDict:
    """Change a recipe's config to the variants of its command line, and return it.

    Args:
      variants: any of `VARIANTS` with commas between. r0: reward the last image; r0plus: reward
        the prediction of a random step; full: train all weights instead of adapters; dryrun: a few
        quick steps on a pipeline in miniature, made on the spot.
      miniature: the name of that pipeline in r0_jax/stand_ins/miniature.py.
    Raises:
      InputError: a variant is unknown, or both r0 and r0plus are asked for.
    """
    chosen = variants.split(",") if variants else []
    for name in chosen:
        if name not in VARIANTS:
            raise InputError(f"variant {name!r} is unknown; known: {', '.join(VARIANTS)}")
    methods = sorted({"r0", "r0plus"} & set(chosen))
    if len(methods) > 1:
        raise InputError("variants r0 and r0plus exclude each other: give one of them")
    if methods:
        config.objective.method = methods[0]
    if "full" in chosen:
        config.lora = base.get_config().lora  # nothing of the recipe's adapters is left
        config.lora.rank = 0
        config.optimizer.learning_rate = 4e-6  # of TDM's full fine-tuning, by the same first author
    if "dryrun" in chosen:
        dry_run(config, miniature)
    return config


def dry_run(config: ConfigDict, miniature: str) -> None:
    """Make the whole main job of a recipe take seconds; its images are nothing to look at."""
    from r0_jax.stand_ins import miniature as miniatures  # slow to import, for dry runs alone
    from r0_jax.stand_ins import miniature_reward

    folder = miniatures.kept(miniature)
    config.pretrained = str(folder / "pipeline")
    sections = (config.rewards, config.heldout_rewards)
    texts = {entry.reads for section in sections for entry in section.values()}
    prompts = folder / ("prompts.jsonl" if "english" in texts else "prompts.txt")
    config.data.prompts = config.eval.prompts = config.test.prompts = str(prompts)
    config.dtype = "float32"
    if config.height:  # of a family whose networks do not say it
        config.height = config.width = 16
    config.steps, config.batch_size, config.device_batch = 4, 4, 2
    config.log_every, config.checkpoint_every, config.eval_every = 1, 2, 2
    config.eval.num_prompts, config.eval.grid = 4, 4
    config.eval.term_norms = False
    config.test.num_prompts, config.test.base_steps = 4, 3
    config.test.diversity_prompts, config.test.samples_per_prompt = 2, 2
    for seed, section in enumerate(sections):
        for entry in section.values():  # each of the type that the recipe trains on
            entry.path, entry.head = str(miniature_reward.kept_reward(entry.type, seed)), ""
    if config.lora.rank:  # the scale stays
        config.lora.alpha, config.lora.rank = 4 * config.lora.alpha / config.lora.rank, 4
    if config.regularizers.score.weight:
        config.regularizers.score.rank = 4
