"""Compares preprocessing with the published path through PIL, and measures a cheaper resize.

    python -m benchmarks.preprocess --out=docs/reports/rewards.md

The first section compares every policy with PIL's resize of 8-bit images, on square, wide and tall
images. The second section measures a cheaper resize from 1024 px: its cost, and its effect on
scores and image gradients. It uses the embedded world's CLIP, on scenes larger than its input by
the same ratio as 1024 px to 224 px.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8
from PIL import Image

from benchmarks import measure
from r0_jax import cli, rewards
from r0_jax.config import reward_entry
from r0_jax.rewards.preprocess import RESIZES, Preprocess
from r0_jax.rewards.reward import value_and_gradient
from r0_jax.shapes import CHECKPOINTS
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import render, sample_layouts, sample_scenes

SIZE = 224
POLICIES = {
    "crop": "crop (CLIP, PickScore, ImageReward)",
    "pad": "pad (HPS)",
    "squash": "squash (Chinese-CLIP)",
}
SHAPES = {
    "square": (1024, 1024),
    "tall": (1344, 768),
    "wide": (768, 1344),
    "512 px": (512, 512),
    "64 px": (64, 64),
}
# Pixels of scenes and of the CLIP's input: a ratio of 4 2/3; that of 1024 px to 224 is 4 4/7.
_SCENE, _TOWER = 224, 48
HEADINGS = "## Preprocessing against PIL", "## Coming down from 1024 px"


def define_flags() -> None:
    flags.DEFINE_integer("images", 64, "number of scenes to score", lower_bound=2)
    flags.DEFINE_integer("repeats", 7, "timed calls after one warm-up call", lower_bound=1)
    cli.define_path("out", None, "document for the two sections; printed by default")


def official(image: Image.Image, prepare: Preprocess) -> Float[np.ndarray, "s s 3"]:
    """Resize as the published code does, with PIL in 8 bits; return pixels in [0, 1].

    This is before normalization by mean and std.
    """
    size, (w, h) = prepare.size, image.size
    if prepare.policy == "crop":  # torchvision's or transformers' resize and centre crop
        width, height = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    elif prepare.policy == "pad":  # hpsv2's ResizeMaxSize, on an image
        width, height = (round(n * (size / max(w, h))) for n in (w, h))
    else:
        width, height = size, size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if prepare.policy == "crop":
        halve = round if prepare.corner == "round" else math.floor
        left, top = halve((width - size) / 2), halve((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    elif prepare.policy == "pad":
        canvas = Image.new("RGB", (size, size))
        canvas.paste(image, ((size - width) // 2, (size - height) // 2))
        image = canvas
    return np.asarray(image, np.float32) / np.float32(255)


def contents(h: int, w: int) -> Iterator[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
    """Yield the names and pixels of two 8-bit images: a photo-like spectrum, and hard edges."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(rng.standard_normal((3, h, w))) / frequency  # amplitude ~ 1 / frequency
    photo = np.moveaxis(np.fft.irfft2(waves, (h, w)), 0, -1)
    photo = np.clip(0.5 + 0.2 * photo / photo.std(), 0, 1)
    yield "photo-like", np.rint(255 * photo).astype(np.uint8)
    blocks = rng.integers(0, 2, (-(-h // 7), -(-w // 7), 3)).repeat(7, 0).repeat(7, 1)
    yield "hard edges", (255 * blocks[:h, :w]).astype(np.uint8)


def difference(
    image: UInt8[np.ndarray, "h w 3"], prepare: Preprocess
) -> Float[np.ndarray, "s s 3"]:
    """Return the absolute differences of our pixels from `official`'s, in units of 1/255."""
    plain = dataclasses.replace(prepare, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = plain(jnp.asarray(image[None], jnp.float32) / 255)[0]
    return 255 * np.abs(np.asarray(ours) - official(Image.fromarray(image), prepare))


def moved(count: int) -> Float[np.ndarray, " n"]:
    """Score scenes with the embedded world's CLIP, with our pixels and with `official`'s.

    Return the absolute differences, as shares of the scores' standard deviation.
    """
    images, prompts = scenes(count, _SCENE)
    files = np.rint(255 * images).astype(np.uint8)
    clip = rewards.load("clip_score", CHECKPOINTS / "clip")
    theirs = [official(Image.fromarray(file), Preprocess(_TOWER, corner="floor")) for file in files]
    expected = np.asarray(clip(np.stack(theirs), prompts))
    found = np.asarray(clip(files / np.float32(255), prompts))
    return np.abs(found - expected) / expected.std()


def against_pil(count: int) -> str:
    """Return the first section."""
    apart = moved(count)
    rows = []
    for policy, label in POLICIES.items():
        prepare = Preprocess(SIZE, policy, corner="round")
        for name, (h, w) in SHAPES.items():
            found = [difference(image, prepare) for _, image in contents(h, w)]
            rows.append(
                [
                    label,
                    f"{name}, {w} x {h}",
                    *(f"{f(x):.2f}" for x in found for f in (np.mean, np.max)),
                ]
            )
    header = ["policy", "image", "photo-like: mean", "largest", "hard edges: mean", "largest"]
    return f"""    python -m benchmarks.preprocess --out=docs/reports/rewards.md

Absolute differences of pixels after the resize to {SIZE} px, in units of 1/255. This library is
float32 and differentiable. The published path is PIL's bicubic on 8-bit images, then crop, padding
or nothing. `tests/rewards/test_preprocess.py` holds bounds. It also shows that PyTorch's resize of
float images gives the same numbers and gradients within 1e-5.

{measure.table(header, rows)}

PIL rounds to 1/255 twice, after either direction: a mean of about 0.3. The rest is overshoot.
Beside edges bicubic leaves [0, 1]. 8 bits clip that after either direction. This library keeps it,
because a clipped pixel would have no gradient. HPS's own code keeps it too: it resizes a float
tensor. Edges between black and white on a 7 px grid are a hard case. The score of the embedded
world's CLIP moves by {apart.mean():.3f} standard deviations of the scores, and by
{apart.max():.3f} at most. That is on {count} of its scenes, from {_SCENE} px to {_TOWER}.

{measure.machine("jax", "pillow")} Seed 0."""


# --- 1024 px --------------------------------------------------------------------------------------


def scenes(count: int, size: int) -> tuple[Float[np.ndarray, "n h w 3"], list[str]]:
    """Draw scenes of the embedded world at `size` pixels; return images and prompts."""
    rng = np.random.default_rng(0)
    drawn = sample_scenes(rng, count, "test")
    prompts = captions_for(drawn, rng)
    return render(drawn, sample_layouts(rng, drawn), size=size), prompts


def judged(
    images: Float[np.ndarray, "n h w 3"], prompts: list[str], resize: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n d"]]:
    """Return scores and flat image gradients of the embedded world's CLIP."""
    clip = rewards.load(
        "clip", reward_entry("clip_score", path=str(CHECKPOINTS / "clip"), resize=resize)
    )
    scores, gradients = clip.value_and_grad(images, prompts)
    return np.asarray(scores), np.asarray(gradients).reshape(len(images), -1)


def effect(count: int) -> list[list[str]]:
    """Return rows: the effect of each resize on scores and gradients."""
    clean, prompts = scenes(count, _SCENE)
    noisy = clean + 0.1 * np.random.default_rng(1).standard_normal(clean.shape, np.float32)
    rows = []
    for name, images in (("clean", clean), ("noise of 0.1", np.clip(noisy, 0, 1))):
        scores, gradients = judged(images, prompts, "bicubic")
        for resize in RESIZES[1:]:
            others, gradients_there = judged(images, prompts, resize)
            cosines = np.sum(gradients * gradients_there, 1) / (
                np.linalg.norm(gradients, axis=1) * np.linalg.norm(gradients_there, axis=1)
            )
            apart = np.abs(others - scores)
            rows.append(
                [
                    f"{resize}, {name}",
                    f"{apart.mean() / scores.std():.4f}",
                    f"{apart.max() / scores.std():.4f}",
                    f"{cosines.mean():.4f}",
                    f"{cosines.min():.4f}",
                ]
            )
    return rows


def cost(preprocessings: dict[str, Sequence[Preprocess]], repeats: int) -> list[list[str]]:
    """Return rows: the cost of resizing one 1024 px image in one program.

    The program computes a separate gradient of each resize.
    """
    images = jnp.asarray(np.random.default_rng(0).random((1, 1024, 1024, 3), np.float32))
    rows = []
    for name, several in preprocessings.items():

        def gradients(images, several=several):
            return [
                value_and_gradient(
                    lambda x, i=i, p=prepare: jnp.sin(i + p(x)).sum((1, 2, 3)), images
                )
                for i, prepare in enumerate(several)
            ]

        compiled = jax.jit(gradients).lower(images).compile()
        rows.append(
            [
                name,
                f"{measure.milliseconds(lambda c=compiled: c(images), repeats):.1f}",
                f"{compiled.cost_analysis()['flops'] / 1e9:.2f}",
                f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f}",
            ]
        )
    return rows


def from_1024(count: int, repeats: int) -> str:
    """Return the second section."""
    plain = Preprocess(SIZE)
    chosen = {f"one, {resize}": [dataclasses.replace(plain, resize=resize)] for resize in RESIZES}
    chosen |= {
        "three that crop": [plain] * 3,
        "one that crops, one that pads, one that squashes": [
            dataclasses.replace(plain, policy=policy) for policy in POLICIES
        ],
    }
    rows = cost(chosen, repeats)
    forward = float(rows[0][2]) / 2
    return f"""    python -m benchmarks.preprocess --out=docs/reports/rewards.md

`resize` of an entry of `config.rewards` says how an image comes down to the tower's size.
"bicubic" (default) is the published path: one antialiased bicubic. At 1024 px it reads 18 x 18
pixels for each of the {SIZE} x {SIZE}. "reduce" averages whole blocks first (2 x 2 at 1024 px) and
leaves bicubic a factor of at least 2, like `reducing_gap` of PIL. This table compares it with
"bicubic", on {count} scenes of the embedded world and its own CLIP, at the same ratio of sizes:

{
        measure.table(
            [
                "resize, images",
                "score, mean change / std of scores",
                "largest",
                "cosine of image gradients, mean",
                "smallest",
            ],
            effect(count),
        )
    }

One image from 1024 to {SIZE} px, forward and each reward's own gradient, in one program:

{measure.table(["rewards", "ms", "GFLOP", "temporary MiB"], rows)}

A ViT-H tower takes about 1000 GFLOP for the same image, so either resize hardly counts. The
published path stays the default. Three rewards resize a square image once, whatever they do with
others: the compiler merges equal resizes. Three times {forward:.2f} GFLOP forward would make
{6 * forward:.2f} in all. The way back is taken once a reward, because each gradient is normalized
by its own norm.

{measure.machine("jax")} Seed 0, median of {repeats} calls."""


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    sections = against_pil(given.images), from_1024(given.images, given.repeats)
    for heading, text in zip(HEADINGS, sections, strict=True):
        measure.publish(given.out, heading, text)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
