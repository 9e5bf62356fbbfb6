"""Makes the result table of a run, or of any pipeline of the embedded world.

python -m r0_jax.evaluate --workdir=W                    three models, as the run's config says
python -m r0_jax.evaluate --pipeline=DIR --out=DIR2      that pipeline alone
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import contextlib
import warnings
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from r0_jax import cli, remote
from r0_jax import config as base
from r0_jax.diffusion import grid
from r0_jax.errors import InputError
from r0_jax.evaluation import report
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.testbed import Model, Testbed, evaluate_models, evaluate_run
from r0_jax.files import check_writable
from r0_jax.models import attention_backend
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.shapes.measures import set_measures
from r0_jax.workdir import mirror, run
from r0_jax.workdir.workdir import Workdir


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("workdir", None, "folder of a run: measures base and generator")
    cli.define_path("pipeline", None, "diffusers folder: measures it alone")
    cli.define_path("out", None, "with --pipeline: folder for eval.json and images")
    flags.DEFINE_bool("overwrite", False, "with --pipeline: replace the eval.json in --out")
    cli.define_path("prompts", None, "file of test prompts; default: the recipe's")
    flags.DEFINE_integer(
        "num_prompts", None, "how many of them; default: the recipe's", lower_bound=2
    )
    # The seed after it is used too, for the images that diversity is measured on.
    flags.DEFINE_integer(
        "seed", None, "of the noise; default: the recipe's", lower_bound=0, upper_bound=2**32 - 2
    )
    flags.DEFINE_string("step", "", "with --workdir: a step, best or latest")
    cli.define_path(
        "pretrained", None, "with --workdir: the run's pretrained pipeline, if it has moved"
    )
    flags.DEFINE_integer("num_inference_steps", 4, "with --pipeline", lower_bound=1)
    flags.DEFINE_float(
        "guidance_scale",
        1.0,
        "with --pipeline; above 1: classifier-free guidance",
        lower_bound=0,
        upper_bound=base.MOST_GUIDANCE,
    )


def main(argv: list[str]) -> None:
    del argv
    fields = flags.FLAGS
    if (fields.workdir is None) == (fields.pipeline is None):
        raise InputError("give either --workdir=W or --pipeline=DIR")
    with (
        contextlib.nullcontext()
        if fields.workdir is None
        else mirror.workdir(fields.workdir) as workdir
    ):
        evaluate(fields, workdir)


def evaluate(fields: Any, workdir: Workdir | None) -> None:
    """Evaluate the run in `workdir`, or --pipeline, as the flags say."""
    if workdir is not None:
        if fields.out or fields.overwrite:
            raise InputError(
                "--out and --overwrite go with --pipeline, not with --workdir: "
                "the folder of the run gets the table"
            )
        opened = run.open_run(workdir, fields.pretrained)
        folder, config, pretrained = workdir.path, opened.config, str(opened.pretrained)
    else:
        if fields.step or fields.pretrained:
            raise InputError("--step and --pretrained go with --workdir, not with --pipeline")
        if not fields.out:
            raise InputError("--pipeline needs --out=DIR for eval.json and the images")
        folder, config, pretrained = remote.output(fields.out), base.get_config(), ""
        set_measures(config)
        _check_free(folder, fields.overwrite)
    if not isinstance(config.get("test"), ConfigDict):
        raise InputError(f"{folder}/config.json has no test, so it is not the config of an R0 run")
    fields_of_test = (f"test.{name}" for name in base.get_config().test if name not in config.test)
    if missing := [*(name for name in ("draw_batch",) if name not in config), *fields_of_test]:
        raise InputError(
            f"{folder}/config.json has no {missing[0]}: it is of an older run, or cut short"
        )
    check_writable(folder / "samples" / "eval")
    with config.unlocked():
        config.pretrained = pretrained
        config.test.prompts = fields.prompts or config.test.prompts
        config.test.num_prompts = fields.num_prompts or config.test.num_prompts
        config.seed = config.seed if fields.seed is None else fields.seed
    if not config.test.prompts:
        raise InputError("the run's config has no test.prompts: give --prompts=FILE")
    if workdir is not None:
        try:
            attention_backend.check(config.attention, config.dtype)
        except InputError as problem:  # it was trained on another machine
            warnings.warn(f"attention is computed by 'xla': {problem}", stacklevel=1)
            config.attention = "xla"
        table = evaluate_run(opened, fields.step)
    else:
        pipeline = families.load(fields.pipeline)
        scheduler = grid.of_folder(pipeline.scheduler_config, fields.num_inference_steps)
        model = Model(
            ImageSampler(pipeline, scheduler, fields.guidance_scale, mesh=sharding.global_mesh()),
            pipeline.params,
        )
        name = f"{Path(fields.pipeline).resolve().name}_{fields.num_inference_steps}"
        table = evaluate_models(Testbed.build(config, pipeline), {name: model}, folder, {})
    report.print_table(table)
    print(f"written: {folder / 'eval.json'}")
    if workdir is not None:
        print(f"report: {report.write_report(folder)}")


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` holds an evaluation that would be lost."""
    there = [path for path in (out / "eval.json", out / "samples" / "eval") if path.exists()]
    if there and not overwrite:
        raise InputError(
            f"{there[0]} exists already; choose another --out or replace it with --overwrite"
        )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
