"""Where a comparison's images come from: models that draw them here, and folders made elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path

from r0_jax.errors import InputError
from r0_jax.evaluation.comparison import Contender, arrange
from r0_jax.evaluation.drawing import Options, Source, draw_missing, identity
from r0_jax.evaluation.gallery import LISTING, Gallery
from r0_jax.evaluation.layouts import LAYOUTS, Naming
from r0_jax.evaluation.pairing import Item, pair, read_listing
from r0_jax.files import loads, write_bytes
from r0_jax.prompts.records import Prompt

_SECONDS = "seconds.json"  # an image, of each batch; beside the images


def drawn(
    name: str,
    source: Source,
    prompts: Sequence[Prompt],
    samples: int,
    options: Options,
    folder: Path,
    overwrite: bool = False,
) -> Contender:
    """Draw `samples` images of each prompt into a folder; a killed call continues.

    Contenders of one seed start from the same noise where their latents have one shape. Raises
    InputError where the folder holds images of another job, unless `overwrite`.
    """
    texts = [prompt.text for prompt in prompts]
    targets = LAYOUTS["flat"].targets(prompts, Naming(samples))
    text = {
        "seed": options.seed,
        "num_inference_steps": len(source.scheduler.timesteps),
        "guidance_scale": options.guidance_scale,
        "eta": source.scheduler.eta,
    }
    job = {**text, **identity(source, texts), "dtype": options.dtype, "samples": samples}
    gallery = Gallery(folder, texts, targets, {}, job)
    gallery.begin(overwrite)
    tokens = source.pipeline.tokenize(texts)
    seconds = draw_missing(gallery, source, texts, tokens, options, text)
    if seconds:
        write_bytes(folder / _SECONDS, json.dumps(seconds).encode())
    gallery.finish()
    items = [Item(folder / target.path, texts[target.prompt]) for target in targets]
    calls = len(source.scheduler.timesteps) * (2 if options.guidance_scale > 1 else 1)
    return Contender(name, items, calls, _read_seconds(folder / _SECONDS))


def of_folder(name: str, folder: Path, prompts: Sequence[str], count: int) -> Contender:
    """Return the images of the first `count` prompts in a folder that another program made.

    They are those of its `prompts.jsonl`, or of a list given in place of the folder; else they
    belong to prompts by their names, as `pairing.pair` says. Raises InputError for prompts without
    images.
    """
    listing = folder if folder.suffix == ".jsonl" else folder / LISTING
    if listing.is_file():
        items = read_listing(listing)
    else:
        items, problems = pair(folder, prompts)
        if problems and len(items) < count:
            raise InputError(f"{folder}: {problems[0]}")
    return Contender(name, arrange(items, prompts[:count], str(folder)))


def _read_seconds(path: Path) -> list[float]:
    try:
        found = loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [float(x) for x in found if isinstance(x, float)] if isinstance(found, list) else []
