"""Draws images of prompts, with a pipeline's folder or a run's generator."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from r0_jax.diffusion import grid
from r0_jax.diffusion.schedulers import Scheduler
from r0_jax.errors import InputError
from r0_jax.evaluation.batches import batches
from r0_jax.evaluation.gallery import Gallery
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import draw_noise, image_number
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline, Tokens, take
from r0_jax.prompts.source import PromptSource
from r0_jax.prompts.text import TextPrompts
from r0_jax.weights import lazy
from r0_jax.weights.network import Params, row_fingerprint
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import Workdir

_TEXT = TextPrompts()


class Source(NamedTuple):
    """What draws images."""

    pipeline: Pipeline
    params: dict[str, Params]  # of every part
    scheduler: Scheduler
    guidance_scale: float = 1.0  # that it was made for


class Options(NamedTuple):
    """How a source draws."""

    guidance_scale: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    batch_size: int = 16


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
    guidance_scale = run.config.sampler.guidance_scale
    return Source(prompts.attach(pipeline), params, scheduler, guidance_scale)


def draw(
    source: Source,
    prompts: Sequence[str],
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    latents: Float[np.ndarray, "n h w c"] | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    tokens: Tokens | None = None,
    samples: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Float[np.ndarray, "b h w 3"]]:
    """Yield batches of images in [0, 1], in order; compiled once.

    By default image i belongs to prompt i. `samples` are other images, as (prompt, sample). The
    noise of each depends on the seed, its prompt's number and its sample's. latents[i], standard
    normal noise, replaces it where image i starts. `tokens` are what the pipeline takes of the
    prompts; by default its tokenizers make them.
    """
    pipeline, params, scheduler, _ = source
    mesh = sharding.local_mesh()
    draw_images = ImageSampler(pipeline, scheduler, guidance_scale, mesh)
    params = lazy.place(params, sharding.replicated(mesh), dtype)
    tokens = pipeline.tokenize(prompts) if tokens is None else tokens
    if samples is None:
        samples = [(prompt, 0) for prompt in range(len(prompts))]
    of_prompt = np.asarray([prompt for prompt, _ in samples], np.int32)
    numbers = np.asarray([image_number(*sample) for sample in samples], np.int32)
    batch_size = min(batch_size, len(samples))
    for rows, count in batches(len(samples), batch_size):
        key = jax.random.key(seed)
        noise, keys = draw_noise(key, jnp.asarray(numbers[rows]), pipeline.latent_shape)
        noise = noise if latents is None else jnp.asarray(latents[rows])
        drawn = draw_images(params, take(tokens, of_prompt[rows]), noise, keys)
        yield np.asarray(drawn)[:count]


def identity(
    source: Source, prompts: Sequence[str], latents: Float[np.ndarray, "n h w c"] | None = None
) -> dict[str, object]:
    """Return what tells other weights, steps, sizes, prompts and noise apart."""
    scheduler = source.scheduler
    leaves = jax.tree_util.tree_flatten_with_path(source.params)[0]
    found: dict[str, object] = {
        "scheduler": type(scheduler).__name__,
        "timesteps": np.asarray(scheduler.timesteps).tolist(),
        "sigmas": np.asarray(scheduler.sigmas).tolist(),
        "size": list(source.pipeline.image_shape[:2]),
        "weights": row_fingerprint({_name(path): leaf for path, leaf in leaves}),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }
    if latents is not None:
        found["noise"] = hashlib.sha256(latents.tobytes()).hexdigest()[:16]
    return found


def _name(path: Sequence[Any]) -> str:
    """Return the name of a leaf of parts of a pipeline: that of its tensor comes last."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def draw_missing(
    gallery: Gallery,
    source: Source,
    prompts: Sequence[str],
    tokens: Tokens,
    options: Options,
    text: Mapping[str, object],
    latents: Float[np.ndarray, "n h w c"] | None = None,
    process: int = 0,
    processes: int = 1,
) -> list[float]:
    """Draw what a gallery lacks of a process's share, with a bar on a terminal.

    `text` goes into PNGs. latents[i] is the noise of the i-th image of all. Returns the seconds an
    image of each batch but the first, which compiles.
    """
    left = gallery.left(process, processes)
    samples = [(target.prompt, sample) for target in left for sample in target.samples]
    if not samples:
        return []
    if latents is not None:
        each = len(latents) // len(prompts)
        latents = latents[[prompt * each + sample for prompt, sample in samples]]
    drawn = draw(
        source, prompts, tokens=tokens, samples=samples, latents=latents, **options._asdict()
    )
    seconds: list[float] = []
    with _progress(len(left)) as done:
        gallery.write(left, _timed(drawn, seconds), text, done)
    return seconds[1:]


def _timed(
    drawn: Iterator[Float[np.ndarray, "b h w 3"]], seconds: list[float]
) -> Iterator[Float[np.ndarray, "b h w 3"]]:
    """Yield batches; append the seconds an image that each took to come.

    All take as long as the first, which is full: the last one is filled up.
    """
    size = 0
    while True:
        start = time.perf_counter()
        batch = next(drawn, None)
        if batch is None:
            return
        size = size or len(batch)
        seconds.append((time.perf_counter() - start) / size)
        yield batch


@contextlib.contextmanager
def _progress(count: int) -> Iterator[Callable[[], None]]:
    """Show a bar of images on a terminal; yield what is called after each."""
    console = Console(stderr=True)
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("sampling", total=count)
        yield lambda: bar.advance(task)
