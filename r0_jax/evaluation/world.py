"""Evaluates images of the embedded world: its judge's verdicts, and rendered scenes of prompts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from r0_jax.errors import InputError
from r0_jax.shapes.captions import parse
from r0_jax.shapes.scene import Scene, render, sample_layouts


def check_prompts(prompts: Sequence[str], source: str) -> None:
    """Raise InputError unless every prompt is a caption of the world's grammar."""
    for number, prompt in enumerate(prompts, start=1):
        if parse(prompt) is None:
            raise InputError(
                f"{source}: prompt {number}, {prompt!r}, is not a caption of a scene, so "
                "the judge cannot look for it; remove it, or set test.world to ''"
            )


def check_shape(shape: Sequence[int]) -> None:
    """Raise InputError unless images [h, w, 3] are square, as scenes are."""
    if shape[0] != shape[1]:
        raise InputError(
            f"the pipeline draws images of {shape[0]} x {shape[1]} pixels, and scenes "
            "are square: set sample_size in its config, or test.world to ''"
        )


def verdicts(
    images: Float[np.ndarray, "b h w 3"], prompts: Sequence[str]
) -> dict[str, Bool[np.ndarray, " _"]]:
    """Return the judge's verdicts: of all images, by language, and by attribute.

    Chinese prompts are those that are not ASCII.
    """
    from r0_jax.shapes.judge import judge  # its scipy takes a second to import

    verdict = judge(images, list(prompts))
    chinese = np.asarray([not prompt.isascii() for prompt in prompts])
    found = {
        "judge_accuracy": verdict.correct,
        "judge_accuracy_en": verdict.correct[~chinese],
        "judge_accuracy_zh": verdict.correct[chinese],
    }
    attributes = ("presence", "colour", "shape", "size", "relation")
    return found | {f"judge_{name}": getattr(verdict, name) for name in attributes}


def render_prompts(prompts: Sequence[str], seed: int) -> Float[np.ndarray, "b h w 3"]:
    """Return one rendered scene for each prompt, with a random layout."""
    scenes = [parse(prompt) for prompt in prompts]
    stacked = Scene(*(np.stack(fields) for fields in zip(*scenes, strict=True)))
    return render(stacked, sample_layouts(np.random.default_rng(seed), stacked))
