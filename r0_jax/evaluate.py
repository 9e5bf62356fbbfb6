"""Makes the result table of a run, of a pipeline of the embedded world, or of models side by side.

    python -m r0_jax.evaluate --workdir=W                  three models, as the run's config says
    python -m r0_jax.evaluate --pipeline=DIR --out=DIR2    that pipeline alone
    python -m r0_jax.evaluate --workdir=W --prompts=FILE --out=DIR2 \\
        --rewards=hps_v2_1=/path,pickscore=/path --images=peer=/path/of/images

With --rewards, --against or --images it compares models on the same prompts and noise: the base
(--against, or the run's own pretrained), then the generator, then folders of images made elsewhere
(docs/benchmarks.md). The same command continues a killed comparison.
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

from r0_jax import cli, compilation_cache, remote
from r0_jax import config as base
from r0_jax.diffusion import grid
from r0_jax.errors import InputError
from r0_jax.evaluation import (
    comparison,
    contenders,
    feature_network,
    hpsv2,
    image_features,
    report,
    result_table,
    scoring,
)
from r0_jax.evaluation.comparison import Contender, Eyes, Judges
from r0_jax.evaluation.drawing import Options, Source, from_pipeline, from_run
from r0_jax.evaluation.feature_network import CLIP
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.pairing import Item, list_images
from r0_jax.evaluation.testbed import Model, Testbed, evaluate_models, evaluate_run
from r0_jax.evaluation.unfinished import job_of
from r0_jax.files import check_writable, is_plain_name
from r0_jax.models import attention_backend
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.prompts import records
from r0_jax.prompts.records import Prompt
from r0_jax.shapes.measures import set_measures
from r0_jax.workdir import mirror, run
from r0_jax.workdir.workdir import Workdir

_CMMD = (336, 768)  # pixels a side and width of the features of published CMMD
# Rewards whose tower tells how different the samples of a prompt are.
_SEEING = ("clip_score", "hps_v2", "hps_v2_1", "pickscore", "chinese_clip")


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("workdir", None, "folder of a run: measures base and generator")
    cli.define_path("pipeline", None, "diffusers folder: measures it alone")
    cli.define_path("out", None, "with --pipeline or a comparison: folder for eval.json and images")
    flags.DEFINE_bool("overwrite", False, "with --out: replace the eval.json and images in it")
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
    flags.DEFINE_integer(
        "num_inference_steps",
        None,
        "with --pipeline, by default 4; in a comparison also of a run, as it trained by default",
        lower_bound=1,
    )
    flags.DEFINE_float(
        "guidance_scale",
        1.0,
        "with --pipeline; above 1: classifier-free guidance",
        lower_bound=0,
        upper_bound=base.MOST_GUIDANCE,
    )
    _define_comparison()


def _define_comparison() -> None:
    cli.define_named_paths("rewards", "compare by them: type=folder, ..., or name:type=folder")
    cli.define_path("against", None, "compare with this diffusers folder, the first of the table")
    cli.define_named_paths("images", "compare with images made elsewhere: name=folder, ...")
    cli.define_paths(
        "features",
        "folder of a CLIP, DINOv2 or converted Inception v3 that sees how far images are from "
        "--reference; may be repeated: the first also sees diversity; default: a CLIP of --rewards",
    )
    flags.DEFINE_enum(
        "fid_resize",
        "clean",
        list(feature_network.FID_RESIZES),
        "how images become Inception's 299 pixels: as clean-fid does, or as TensorFlow 1",
    )
    cli.define_path("reference", None, "folder of real images, for CMMD, FID and other distances")
    flags.DEFINE_integer(
        "against_steps", None, "of the base; default: as the run's test says, or 25", lower_bound=1
    )
    flags.DEFINE_float(
        "against_guidance_scale",
        None,
        "of the base; default: as the run's test says, or 7.5",
        lower_bound=0,
        upper_bound=base.MOST_GUIDANCE,
    )
    flags.DEFINE_integer(
        "samples_per_prompt", 1, "in a comparison; from 2 on it measures diversity", lower_bound=1
    )
    flags.DEFINE_string("column", None, "in a comparison: of the prompts")
    flags.DEFINE_integer("batch_size", 16, "in a comparison: images at once", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "in a comparison")
    for side in ("height", "width"):
        flags.DEFINE_integer(
            side,
            0,
            "of a comparison's images; default: the pipeline's, or the run's",
            lower_bound=0,
        )


def main(argv: list[str]) -> None:
    del argv
    fields = flags.FLAGS
    compilation_cache.keep()
    if fields.rewards or fields.against or fields.images:
        compare(fields)
        return
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
    _check_test(folder, config)
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
        steps = fields.num_inference_steps or 4
        scheduler = grid.of_folder(pipeline.scheduler_config, steps)
        model = Model(
            ImageSampler(pipeline, scheduler, fields.guidance_scale, mesh=sharding.global_mesh()),
            pipeline.params,
        )
        name = f"{Path(fields.pipeline).resolve().name}_{steps}"
        table = evaluate_models(Testbed.build(config, pipeline), {name: model}, folder, {})
    result_table.print_table(table)
    print(f"written: {folder / 'eval.json'}")
    if workdir is not None:
        print(f"report: {report.write_report(folder)}")


def _check_test(folder: Path, config: ConfigDict) -> None:
    """Raise InputError for a config of a workdir that does not say how its run is measured."""
    if not isinstance(config.get("test"), ConfigDict):
        raise InputError(f"{folder}/config.json has no test, so it is not the config of an R0 run")
    fields_of_test = (f"test.{name}" for name in base.get_config().test if name not in config.test)
    if missing := [*(name for name in ("draw_batch",) if name not in config), *fields_of_test]:
        raise InputError(
            f"{folder}/config.json has no {missing[0]}: it is of an older run, or cut short"
        )


def compare(fields: Any) -> None:
    """Compare models as the flags say."""
    if fields.workdir is not None and fields.pipeline is not None:
        raise InputError("give either --workdir=W or --pipeline=DIR")
    if not (fields.workdir or fields.pipeline or fields.images):
        raise InputError("--against compares with --workdir=W, --pipeline=DIR or --images=NAME=DIR")
    if missing := [f"--{name}=..." for name in ("prompts", "out") if not fields[name].value]:
        raise InputError(f"a comparison needs {' and '.join(missing)} (see --help)")
    if fields.pipeline is not None and (fields.step or fields.pretrained):
        raise InputError("--step and --pretrained go with --workdir, not with --pipeline")
    out = remote.output(fields.out)
    if (out / "eval.json").exists() and not fields.overwrite:
        raise InputError(
            f"{out / 'eval.json'} exists already; choose another --out or replace it with "
            "--overwrite"
        )
    check_writable(out)
    every = records.read(fields.prompts, fields.column)
    prompts = every[: fields.num_prompts]
    peers = _peers(fields, [prompt.text for prompt in every], len(prompts))
    judges = _judges(fields)
    found = _drawn(fields, prompts, out) + peers
    names = [contender.name for contender in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two models are called {twice!r}: give one another name or other steps")
    facts = {
        "seed": fields.seed or 0,
        "samples_per_prompt": fields.samples_per_prompt,
        "rewards": fields.rewards or [],
        "features": fields.features or ["of the first reward with a CLIP"],
        "reference": fields.reference or "",
    }
    table = comparison.compare(found, prompts, judges, out, facts, fields.batch_size)
    result_table.print_table(table)
    for name, rewards in table.get("hpsv2", {}).items():
        hpsv2.print_table(name, rewards)
    print(f"written: {out / 'eval.json'}")
    print(f"report: {report.write_report(out)}")


def _peers(fields: Any, prompts: list[str], count: int) -> list[Contender]:
    """Return the images made elsewhere of the first `count` prompts."""
    found = []
    for item in fields.images or ():
        name, _, where = item.partition("=")
        if not (is_plain_name(name) and where):
            raise InputError(
                f"--images: {item!r} should read name=folder, where the name is that of a file"
            )
        found.append(contenders.of_folder(name, remote.local(where), prompts, count))
    return found


def _judges(fields: Any) -> Judges:
    """Load the rewards and what sees features, and look at the reference with it."""
    given, dtype = fields.rewards or [], fields.dtype
    found = scoring.load_rewards(given, dtype)
    split = [scoring.split(item) for item in given]
    seeing = fields.features or [x for _, kind, x in split if kind in _SEEING][:1]
    networks = [feature_network.load(x, dtype, fields.fid_resize) for x in seeing]
    names = [network.frechet for network in networks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--features: two of the folders measure {twice}: give one of a kind")
    eyes = [Eyes(network) for network in networks]
    if fields.reference is not None:
        if not eyes:
            raise InputError("--reference needs --features=DIR of a CLIP, DINOv2 or Inception v3")
        for network, folder in zip(networks, seeing, strict=True):
            if network.kind == CLIP and (network.prepare.size, network.width) != _CMMD:
                warnings.warn(
                    f"published CMMD is of CLIP ViT-L/14 at 336 pixels, which {folder} is not: "
                    "compare its values with each other only",
                    stacklevel=2,
                )
        real = [Item(path, "") for path in list_images(remote.local(fields.reference))]
        if len(real) < 4:
            raise InputError(f"{fields.reference} holds {len(real)} images, fewer than 4")
        eyes = [
            Eyes(network, image_features.encode(network, real, fields.batch_size))
            for network in networks
        ]
    kinds = {name: kind for name, kind, _ in split}
    return Judges(found, kinds, eyes, job_of(found, given, dtype))


def _drawn(fields: Any, prompts: list[Prompt], out: Path) -> list[Contender]:
    """Draw with the base, and with the generator or pipeline, as the flags say."""
    if fields.workdir is None:
        ours = None
        if fields.pipeline is not None:
            steps = fields.num_inference_steps or 4
            name = f"{Path(fields.pipeline).resolve().name}_{steps}"
            source = _sized(from_pipeline(fields.pipeline, steps), fields)
            ours = (name, source, fields.guidance_scale)
        return _draw_all(fields, prompts, out, fields.against, 25, 7.5, ours)
    with mirror.workdir(fields.workdir) as workdir:
        config = run.read_config(workdir.path)
        _check_test(workdir.path, config)
        steps = fields.num_inference_steps
        source = _sized(from_run(workdir, steps, fields.step, fields.pretrained), fields)
        return _draw_all(
            fields,
            prompts,
            out,
            fields.against or str(source.pipeline.folder),
            config.test.base_steps,
            config.test.guidance_scale,
            (f"r0_{len(source.scheduler.timesteps)}", source, source.guidance_scale),
        )


def _draw_all(
    fields: Any,
    prompts: list[Prompt],
    out: Path,
    against: str | None,
    steps: int,
    guidance_scale: float,
    ours: tuple[str, Source, float] | None,
) -> list[Contender]:
    """Draw with the folder `against`, in these steps unless flags say others, and with ours."""
    found = []
    if against is not None:
        steps = fields.against_steps or steps
        if fields.against_guidance_scale is not None:
            guidance_scale = fields.against_guidance_scale
        base = from_pipeline(against, steps)
        size = base.pipeline.image_shape if ours is None else ours[1].pipeline.image_shape
        base = base._replace(pipeline=base.pipeline.sized(*size[:2]))
        name = Path(against).resolve().name if fields.against else "base"
        guided = "_guided" if guidance_scale > 1 else ""
        found.append((f"{name}_{steps}{guided}", base, guidance_scale))
    if ours is not None:
        found.append(ours)
    return [
        contenders.drawn(
            name,
            source,
            prompts,
            fields.samples_per_prompt,
            Options(guidance, fields.seed or 0, fields.dtype, fields.batch_size),
            out / "images" / name,
            fields.overwrite,
        )
        for name, source, guidance in found
    ]


def _sized(source: Source, fields: Any) -> Source:
    return source._replace(pipeline=source.pipeline.sized(fields.height, fields.width))


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
