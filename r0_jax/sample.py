"""Draws the images of a list of prompts, with a pipeline's folder or a run's generator.

    python -m r0_jax.sample --pipeline=DIR --prompts=FILE --out=DIR --num_inference_steps=25 \\
        --guidance_scale=7.5
    python -m r0_jax.sample --workdir=W --prompts=FILE --out=DIR
    python -m r0_jax.sample --workdir=W --prompts=FILE --out=DIR --layout=geneval

`--layout` writes the files that a benchmark's public scorer reads (docs/benchmarks.md). The same
command continues a killed call. Several processes share the work by --process and --processes.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

from pathlib import Path
from typing import Any

from absl import flags

from r0_jax import cli, compilation_cache, remote
from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.evaluation import gallery
from r0_jax.evaluation.drawing import (
    Options,
    Source,
    draw,
    draw_missing,
    from_pipeline,
    from_run,
    identity,
)
from r0_jax.evaluation.gallery import Gallery
from r0_jax.evaluation.layouts import LAYOUTS, Naming
from r0_jax.evaluation.noise import MOST_PROMPTS, MOST_SAMPLES, read_latents
from r0_jax.files import check_writable
from r0_jax.prompts import encoded, files, records
from r0_jax.prompts.source import PromptSource
from r0_jax.prompts.text import TextPrompts
from r0_jax.workdir import mirror

__all__ = ["Source", "draw", "from_pipeline", "from_run", "read_latents"]  # for programs of users
_TEXT = TextPrompts()


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("pipeline", None, "diffusers folder; its own scheduler is used")
    cli.define_path(
        "workdir", None, "or the folder of a run: its generator (EMA) on the grid it was trained on"
    )
    cli.define_path(
        "prompts",
        None,
        f"{', '.join(files.SUFFIXES)}, a tfds folder, or a folder of such files",
        required=True,
    )
    flags.DEFINE_string("column", None, "of the prompts; default: prompt, caption or text")
    flags.DEFINE_string(
        "id_column", None, "of the prompts' ids; default: as the layout says, or id"
    )
    cli.define_path("out", None, "folder for images, prompts.jsonl and a sheet", required=True)
    flags.DEFINE_enum("layout", "flat", list(LAYOUTS), "names of the images, for a public scorer")
    flags.DEFINE_integer(
        "samples_per_prompt",
        None,
        "images of each prompt; default: as the layout's benchmark asks for",
        lower_bound=1,
        upper_bound=MOST_SAMPLES,
    )
    flags.DEFINE_string("model_name", None, "in paths of a layout; default: of the source's folder")
    flags.DEFINE_enum(
        "language",
        "en",
        ["en", "zh", "en_long", "zh_long"],
        "of prompts: with --layout=unigenbench",
    )
    flags.DEFINE_integer(
        "process", None, "number of this process among those that share the work", lower_bound=0
    )
    flags.DEFINE_integer(
        "processes", None, "number of processes that share the work", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_inference_steps", None, "default: 4, or as many as the run trained", lower_bound=1
    )
    flags.DEFINE_float(
        "guidance_scale",
        None,
        "above 1: classifier-free guidance, with two network evaluations a step; default: 1, or "
        "as the run trained",
        lower_bound=0,
        upper_bound=base.MOST_GUIDANCE,
    )
    flags.DEFINE_list(
        "sigmas",
        None,
        "with --pipeline of SD3: the noise level of each step, before the scheduler's shift; "
        "default for up to 4 steps: as in training, 1,.75,.5,.25",
    )
    flags.DEFINE_float(
        "eta",
        None,
        "with --pipeline of DDIM: 1 makes its steps those of DDPM; with --workdir, 0 or 1: the "
        "share of each step's noise that is drawn anew; default: 0, or that of the run",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "of the noise; an image depends on the seed, the number of its prompt and of its sample",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    cli.define_path("latents", None, ".npy with the noise itself: [images, h, w, c], N(0, 1)")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "the networks compute in it")
    flags.DEFINE_string(
        "step",
        "",
        "with --workdir: a step, best (by the held-out reward) or latest; "
        "default: best if it was measured, else latest",
    )
    cli.define_path(
        "pretrained", None, "with --workdir: the run's pretrained pipeline, if it has moved"
    )
    cli.define_path(
        "encoded",
        None,
        "folder of encoded prompts (docs/prompts.md): take the embeddings from its evaluation "
        "prompts, without a text encoder",
    )
    flags.DEFINE_integer("batch_size", 16, "images drawn at once", lower_bound=1)
    for side in ("height", "width"):
        flags.DEFINE_integer(
            side, 0, "of the images in pixels; default: the pipeline's, or the run's", lower_bound=0
        )
    flags.DEFINE_bool("overwrite", False, "replace the images of another call in --out")


def main(argv: list[str]) -> None:
    del argv
    fields = flags.FLAGS
    _check_flags(fields)
    process, processes = _share(fields)
    out = remote.output(fields.out)
    if not gallery.is_recorded(out):
        gallery.check_free(out, fields.overwrite)
    check_writable(out)
    layout = LAYOUTS[fields.layout]
    naming = Naming(
        fields.samples_per_prompt or layout.samples,
        fields.model_name or Path(fields.workdir or fields.pipeline).absolute().name,
        fields.language,
    )
    prompts = records.read(fields.prompts, fields.column, fields.id_column, layout.ids)
    if naming.samples > 1 and len(prompts) > MOST_PROMPTS:
        raise InputError(f"{fields.prompts} has more than {MOST_PROMPTS} prompts: split it")
    targets = layout.targets(prompts, naming)
    compilation_cache.keep()
    read_by = _TEXT if fields.encoded is None else encoded.open_folder(fields.encoded)
    source = _source(fields, read_by)
    guidance_scale = fields.guidance_scale
    if guidance_scale is None:
        guidance_scale = source.guidance_scale
    if guidance_scale > 1:
        read_by.check_guidance("--guidance_scale")
    pipeline = source.pipeline
    layout.check_shape(pipeline.image_shape, naming.samples)
    text: dict[str, object] = {
        "seed": fields.seed,
        "num_inference_steps": len(source.scheduler.timesteps),
        "guidance_scale": guidance_scale,
        "eta": source.scheduler.eta,
    }
    latents = None
    if fields.latents is not None:
        latents = read_latents(
            remote.local(fields.latents), (len(prompts) * naming.samples, *pipeline.latent_shape)
        )
        text["latents"] = Path(fields.latents).name
    texts = [prompt.text for prompt in prompts]
    job = {**text, **identity(source, texts, latents), "dtype": fields.dtype}
    images = Gallery(out, texts, targets, layout.notes(prompts, naming), job)
    images.begin(fields.overwrite)
    if fields.overwrite and processes > 1 and images.stale:
        raise InputError(
            "--overwrite is for one process: delete the folder of --out, or its images"
        )
    tokens = read_by.tokens(texts, fields.prompts, pipeline)
    options = Options(guidance_scale, fields.seed, fields.dtype, fields.batch_size)
    draw_missing(images, source, texts, tokens, options, text, latents, process, processes)
    if not images.finish():
        print(f"the share of process {process} is in {out}; other processes are still drawing")
        return
    of = f" of the first {len(images.shown)}" if len(images.shown) < len(targets) else ""
    print(f"{len(targets)} images are in {out}, and contact_sheet.png{of}")


def _check_flags(fields: Any) -> None:
    """Raise InputError for flags that do not go together."""
    if (fields.pipeline is None) == (fields.workdir is None):
        raise InputError("give either --pipeline=DIR or --workdir=W")
    if fields.workdir is not None and fields.sigmas:
        raise InputError("--sigmas goes with --pipeline: a run is sampled on its own grid")
    if fields.workdir is not None and fields.eta not in (None, 0, 1):
        raise InputError(f"--eta={fields.eta:g} must be 0 or 1 with --workdir")
    if fields.pipeline is not None and (fields.step or fields.pretrained):
        raise InputError("--step and --pretrained go with --workdir, not with --pipeline")
    if fields.language != "en" and fields.layout != "unigenbench":
        raise InputError("--language goes with --layout=unigenbench")


def _share(fields: Any) -> tuple[int, int]:
    """Return the number of this process and of all that share the work."""
    if (fields.process is None) != (fields.processes is None):
        raise InputError("--process and --processes go together")
    process, processes = fields.process or 0, fields.processes or 1
    if process >= processes:
        raise InputError(f"--process={process} must be below --processes={processes}")
    return process, processes


def _source(fields: Any, read_by: PromptSource) -> Source:
    """Load what the flags say, at the size that they say."""
    if fields.workdir is None:
        sigmas = _read_sigmas(fields.sigmas)
        steps = fields.num_inference_steps or (len(sigmas) if sigmas else 4)
        source = from_pipeline(fields.pipeline, steps, sigmas, fields.eta, read_by)
    else:
        with mirror.workdir(fields.workdir) as workdir:
            source = from_run(
                workdir,
                fields.num_inference_steps,
                fields.step,
                fields.pretrained,
                fields.eta,
                read_by,
            )
    return source._replace(pipeline=source.pipeline.sized(fields.height, fields.width))


def _read_sigmas(texts: list[str] | None) -> list[float] | None:
    """Parse --sigmas: numbers in (0, 1] that descend."""
    if not texts:
        return None
    try:
        sigmas = [float(text) for text in texts]
    except ValueError:
        sigmas = [0.0]
    ends = [*sigmas[1:], 0.0]
    if not all(1 >= sigma > after for sigma, after in zip(sigmas, ends, strict=True)):
        raise InputError(f"--sigmas={','.join(texts)}: expected numbers from 1 down to above 0")
    return sigmas


if __name__ == "__main__":
    define_flags()
    cli.run(main)
