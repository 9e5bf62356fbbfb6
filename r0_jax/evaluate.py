"""Makes the result table of a run, or of any pipeline of the embedded world.

    python -m r0_jax.evaluate --workdir=W                    all three, as the run's config says
    python -m r0_jax.evaluate --pipeline=DIR --out=DIR2      that pipeline alone
"""

from pathlib import Path

from absl import flags

from r0_jax import cli, report, run, schedulers
from r0_jax.errors import InputError
from r0_jax.inference import ImageSampler
from r0_jax.pipelines import stable_diffusion
from r0_jax.testbed import Model, Testbed, evaluate_models, evaluate_run

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run: measures base and generator")
_PIPELINE = flags.DEFINE_string("pipeline", None, "diffusers folder: measures it alone")
_OUT = flags.DEFINE_string("out", None, "with --pipeline: folder for eval.json and images")
_PROMPTS = flags.DEFINE_string("prompts", None, "file of test prompts; default: the recipe's")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", None, "how many of them; default: the recipe's",
                                    lower_bound=2)
_SEED = flags.DEFINE_integer("seed", None, "of the noise; default: the recipe's")
_STEP = flags.DEFINE_string("step", "", "with --workdir: a step, best or latest")
_STEPS = flags.DEFINE_integer("num_inference_steps", 4, "with --pipeline", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance_scale", 1.0, "with --pipeline; above 1 it is on")


def main(argv: list[str]) -> None:
    del argv
    if (_WORKDIR.value is None) == (_PIPELINE.value is None):
        raise InputError("give either --workdir=W or --pipeline=DIR")
    if _WORKDIR.value:
        folder, config = Path(_WORKDIR.value), run.read_config(Path(_WORKDIR.value))
    else:
        from configs import shapes_r0  # the recipe of the world says what is measured

        if not _OUT.value:
            raise InputError("--pipeline needs --out=DIR for eval.json and the images")
        folder, config = Path(_OUT.value), shapes_r0.get_config()
    with config.unlocked():
        config.test.prompts = _PROMPTS.value or config.test.prompts
        config.test.num_prompts = _NUM_PROMPTS.value or config.test.num_prompts
        config.seed = config.seed if _SEED.value is None else _SEED.value
    if not config.test.prompts:
        raise InputError("the run's config has no test.prompts: give --prompts=FILE")
    if _WORKDIR.value:
        table = evaluate_run(folder, config, _STEP.value)
    else:
        pipeline = stable_diffusion.load(_PIPELINE.value)
        scheduler = schedulers.from_config(pipeline.scheduler_config, _STEPS.value)
        model = Model(ImageSampler(pipeline, scheduler, _GUIDANCE.value), pipeline.params)
        name = f"{Path(_PIPELINE.value).resolve().name}_{_STEPS.value}"
        table = evaluate_models(Testbed.build(config, pipeline), {name: model}, folder, {})
    report.print_table(table)
    print(f"written: {folder / 'eval.json'}")


if __name__ == "__main__":
    cli.run(main)
