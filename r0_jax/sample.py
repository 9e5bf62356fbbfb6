"""Draws the images of a list of prompts, with a pipeline's folder or a run's generator.

    python -m r0_jax.sample --pipeline=DIR --prompts=FILE --out=DIR --num_inference_steps=25 \\
        --guidance_scale=7.5
    python -m r0_jax.sample --workdir=W --prompts=FILE --out=DIR
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from absl import flags
from jaxtyping import Float

from r0_jax import cli, machine, remote
from r0_jax import config as base
from r0_jax.diffusion import grid
from r0_jax.diffusion.schedulers import Scheduler
from r0_jax.errors import InputError
from r0_jax.evaluation import images
from r0_jax.evaluation.batches import batches
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import draw_noise
from r0_jax.files import check_not_pointer, check_regular, check_writable
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline, Tokens, take
from r0_jax.prompts import encoded, files
from r0_jax.prompts.source import PromptSource
from r0_jax.prompts.text import TextPrompts
from r0_jax.weights import lazy
from r0_jax.weights.network import Params
from r0_jax.workdir import mirror
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import Workdir

_TEXT = TextPrompts()
_ON_SHEET = 64  # images at most; viewers do not open a sheet of more


class Source(NamedTuple):
    """What draws images."""

    pipeline: Pipeline
    params: dict[str, Params]  # of every part
    scheduler: Scheduler


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("pipeline", None, "diffusers folder; its own scheduler is used")
    cli.define_path(
        "workdir", None, "or the folder of a run: its generator (EMA) on the grid it was trained on"
    )
    cli.define_path(
        "prompts", None, ".txt, .jsonl, .json, .parquet or a tfds folder", required=True
    )
    cli.define_path("out", None, "folder for 00000.png, ... and contact_sheet.png", required=True)
    flags.DEFINE_integer(
        "num_inference_steps", None, "default: 4, or as many as the run trained", lower_bound=1
    )
    flags.DEFINE_float(
        "guidance_scale",
        1.0,
        "above 1: classifier-free guidance, with two network evaluations a step",
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
        "of the noise; image i depends on the seed and i, not on the batch",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    cli.define_path("latents", None, ".npy with the noise itself: [prompts, h, w, c], N(0, 1)")
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
    flags.DEFINE_bool("overwrite", False, "replace the images of an earlier call in --out")


def from_pipeline(
    folder: str | Path,
    num_inference_steps: int,
    sigmas: Sequence[float | int] | None = None,
    eta: float | int | None = None,
    prompts: PromptSource = _TEXT,
) -> Source:
    """Load a diffusers folder, sampled by its own scheduler; `sigmas` as for stock SD3 pipelines.

    `eta` is for DDIM. For encoded `prompts` the folder needs no text encoders.
    """
    pipeline = prompts.attach(families.load(folder, text=prompts.text))
    scheduler = grid.of_folder(pipeline.scheduler_config, num_inference_steps, sigmas)
    if eta is not None:
        scheduler = scheduler.with_eta(eta)
    return Source(pipeline, pipeline.params, scheduler)


def from_run(
    workdir: Workdir,
    num_inference_steps: int | None = None,
    step: str = "",
    pretrained: str | Path | None = None,
    eta: float | int | None = None,
    prompts: PromptSource = _TEXT,
) -> Source:
    """Load the EMA generator of a run, in float32, on its grid; `step` as for `Run.choose_step`.

    `eta`, 0 or 1, replaces that of the run. For encoded `prompts` its pipeline needs no text
    encoders.
    """
    run = open_run(workdir, pretrained, text=prompts.text)
    chosen = run.choose_step(step)
    try:
        pipeline = run.pipeline
    except InputError as problem:
        if prompts.text and (folder := run.config.data.encoded):
            raise InputError(
                f"{problem} (the run was trained without text encoders: "
                f"sample it so too, with --encoded={folder})"
            ) from None
        raise
    weights = run.weights(run.params(chosen), "float32")
    scheduler = grid.grid(
        pipeline.scheduler_config,
        num_inference_steps or run.config.sampler.num_steps,
        run.config.sampler.eta if eta is None else eta,
    )
    params = pipeline.params | {pipeline.generator_part: weights}
    return Source(prompts.attach(pipeline), params, scheduler)


def draw(
    source: Source,
    prompts: list[str],
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    latents: Float[np.ndarray, "n h w c"] | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    tokens: Tokens | None = None,
) -> Iterator[Float[np.ndarray, "b h w 3"]]:
    """Yield batches of images in [0, 1], in the order of the prompts; compiled once.

    Image i belongs to prompt i. Its noise depends on (seed, i). latents[i], standard normal noise,
    replaces it where images start. `tokens` are what the pipeline takes of the prompts; by default
    its tokenizers make them.
    """
    pipeline, params, scheduler = source
    mesh = sharding.local_mesh()
    draw_images = ImageSampler(pipeline, scheduler, guidance_scale, mesh)
    params = lazy.place(params, sharding.replicated(mesh), dtype)
    tokens = pipeline.tokenize(prompts) if tokens is None else tokens
    batch_size = min(batch_size, len(prompts))
    for indices, count in batches(len(prompts), batch_size):
        noise, keys = draw_noise(jax.random.key(seed), jnp.asarray(indices), pipeline.latent_shape)
        noise = noise if latents is None else jnp.asarray(latents[indices])
        drawn = draw_images(params, take(tokens, indices), noise, keys)
        yield np.asarray(drawn)[:count]


def read_latents(path: str | Path, shape: tuple[int, ...]) -> Float[np.ndarray, "n h w c"]:
    """Read the noise in a .npy file, as float32; raise InputError that says what is expected."""
    expected = f"expected a .npy file of finite numbers of shape {list(shape)}, [N, h, w, c]"
    check_regular(path)
    try:
        with open(path, "rb") as file:
            _check_header(path, file, shape, expected)
            latents = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; {expected}") from None
    except InputError:
        raise
    except Exception as error:  # numpy raises any kind for a broken header or zip file
        if machine.problem(error):
            raise
        check_not_pointer(path)
        raise InputError(f"{path} is not a whole .npy file of numbers; {expected}") from None
    if not isinstance(latents, np.ndarray):
        raise InputError(f"{path} holds several arrays; {expected}")
    if latents.shape != shape:
        raise InputError(f"{path} has shape {list(latents.shape)}; {expected}")
    if not np.issubdtype(latents.dtype, np.floating):
        raise InputError(f"{path} holds {latents.dtype}, not floating-point numbers; {expected}")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
        latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise InputError(f"{path} holds NaN or infinite numbers; {expected}")
    return latents


def _check_header(path: str | Path, file: BinaryIO, shape: tuple[int, ...], expected: str) -> None:
    """Raise InputError where a .npy file says another shape, before so much is allocated."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        found, _, _ = read(file)
    except Exception:  # of any kind in a broken header; np.load finds the same
        found = shape
    file.seek(0)
    if found != shape:
        raise InputError(f"{path} has shape {list(found)}; {expected}")


def main(argv: list[str]) -> None:
    del argv
    fields = flags.FLAGS
    if (fields.pipeline is None) == (fields.workdir is None):
        raise InputError("give either --pipeline=DIR or --workdir=W")
    if fields.workdir is not None and fields.sigmas:
        raise InputError("--sigmas goes with --pipeline: a run is sampled on its own grid")
    if fields.workdir is not None and fields.eta not in (None, 0, 1):
        raise InputError(f"--eta={fields.eta:g} must be 0 or 1 with --workdir")
    if fields.pipeline is not None and (fields.step or fields.pretrained):
        raise InputError("--step and --pretrained go with --workdir, not with --pipeline")
    out = remote.output(fields.out)
    earlier = _earlier(out)
    if earlier and not fields.overwrite:
        raise InputError(
            f"{out} holds images already ({earlier[0].name}); choose another --out or "
            "replace them with --overwrite"
        )
    check_writable(out)
    prompts = files.read_prompts(fields.prompts)
    read_by = _TEXT if fields.encoded is None else encoded.open_folder(fields.encoded)
    if fields.guidance_scale > 1:
        read_by.check_guidance("--guidance_scale")
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
    text = {
        "seed": fields.seed,
        "num_inference_steps": len(source.scheduler.timesteps),
        "guidance_scale": fields.guidance_scale,
        "eta": source.scheduler.eta,
    }
    source = source._replace(pipeline=source.pipeline.sized(fields.height, fields.width))
    latents = None
    if fields.latents is not None:
        latents = read_latents(
            remote.local(fields.latents), (len(prompts), *source.pipeline.latent_shape)
        )
        text["latents"] = Path(fields.latents).name
    drawn = draw(
        source,
        prompts,
        guidance_scale=fields.guidance_scale,
        seed=fields.seed,
        latents=latents,
        dtype=fields.dtype,
        batch_size=fields.batch_size,
        tokens=read_by.evaluation(fields.prompts, len(prompts), source.pipeline, []).tokens,
    )
    _write(out, prompts, drawn, text, math.ceil(len(prompts) / fields.batch_size))


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


def _earlier(out: Path) -> list[Path]:
    """Return the files that an earlier call wrote there."""
    names = re.compile(r"\d{5,}\.png|contact_sheet\.(png|html)")
    return sorted(path for path in out.glob("*.*") if names.fullmatch(path.name))


def _write(
    out: Path,
    prompts: list[str],
    drawn: Iterator[np.ndarray],
    text: dict[str, object],
    count: int,
) -> None:
    console = rich.console.Console(stderr=True)
    shown, written = [], 0
    for batch in rich.progress.track(
        drawn, "sampling", total=count, console=console, disable=not console.is_terminal
    ):
        broken = ~np.isfinite(batch).all(axis=(1, 2, 3))
        if broken.any():
            prompt = prompts[written + int(broken.argmax())]
            raise InputError(
                f"the image of {prompt!r} is NaN, so it is not written: try --dtype=float32, and "
                "check that the pipeline's weights are whole"
            )
        if not written:
            for path in _earlier(out):  # else images of a longer list would stay among the new ones
                path.unlink()
        for image in batch:
            path, prompt = out / f"{written:05d}.png", prompts[written]
            images.save_png(path, image, {"prompt": prompt, "index": written, **text})
            written += 1
        shown = [*shown, *batch[: max(0, _ON_SHEET - len(shown))]]
    sheet = out / "contact_sheet.png"
    images.contact_sheet(np.stack(shown), prompts[: len(shown)], sheet)
    of = f" of the first {len(shown)}" if len(shown) < written else ""
    print(f"{written} images are in {out}, and {sheet.name}{of}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
