"""Pairs of images of one scene, both decoded by the VAE: a clean one, and one with a fault.

Few denoising steps cause such faults. The images differ in nothing else, so a reward learns the
fault.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from r0_jax.diffusion import grid
from r0_jax.evaluation.image_sampler import sample_latents
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.pretrain import clip
from r0_jax.pretrain.degrade import morph, warp
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import Scene, render
from r0_jax.weights import lazy

GUIDANCE = (1.0, 3.0)
_BATCH = 64


class Pairs(NamedTuple):
    """Pairs of images as bytes, which saves memory."""

    scenes: Scene
    better: UInt8[np.ndarray, "n h w 3"]
    worse: UInt8[np.ndarray, "n h w 3"]

    def take(self, rows: np.ndarray) -> "Pairs":
        return jax.tree.map(lambda field: field[rows], self)


def pairs(pipeline: Pipeline, seed: int, steps: tuple[int, ...], batches: int) -> Pairs:
    """Draw pairs of training scenes: `batches` batches of 64 for each way to make the worse image.

    - Noise the latents to a step of a grid of `steps` steps, and denoise them on that grid, with
      and without guidance. The step is the first, or lies a quarter or half of the way.
    - Bend the outlines, or morph them towards another shape.
    """
    ways = [_outlines_bent(pipeline), _outlines_morphed(pipeline)]
    for count, guidance in itertools.product(steps, GUIDANCE):
        redrawn = _redrawn(pipeline, count, guidance)  # compiled once for all first steps
        ways += [
            functools.partial(redrawn, first)
            for first in sorted({0, (count + 1) // 4, (count + 1) // 2})
        ]
    rng = np.random.default_rng(seed)
    params = lazy.place(pipeline.params)
    made = []
    for way in ways:
        for _ in range(batches):
            scenes, layouts = clip.training_batch(rng, _BATCH)
            tokens = pipeline.tokenize(captions_for(scenes, rng))
            towards = clip.other_shapes(rng, scenes)
            key = jax.random.key(rng.integers(2**31))
            drawn = way(params, key, scenes, layouts, tokens, towards)
            made.append(Pairs(scenes, *jax.device_get(drawn)))
    return jax.tree.map(lambda *fields: np.concatenate(fields), *made)


def _redrawn(pipeline: Pipeline, count: int, guidance: float):
    """Return a way like the others, with one more first argument: the first step of denoising."""
    scheduler = grid.grid(pipeline.scheduler_config, count)
    empty = jax.tree.map(jnp.asarray, pipeline.tokenize([""]))

    @jax.jit
    def draw(first, params, key, scenes, layouts, tokens, towards):
        del towards
        latents = _encode(pipeline, params, render(scenes, layouts, xp=jnp))
        alpha, sigma = (jnp.asarray(x)[first] for x in (scheduler.alphas, scheduler.sigmas))
        noised = alpha * latents + sigma * jax.random.normal(key, latents.shape)
        told = pipeline.encode_prompt(params, tokens)
        negative = pipeline.encode_negative(params, empty, told) if guidance > 1 else None
        redrawn = sample_latents(
            pipeline,
            scheduler,
            params[pipeline.generator_part],
            noised,
            told,
            negative,
            guidance,
            first=first,
        )
        return _bytes(pipeline, params, latents), _bytes(pipeline, params, redrawn)

    return draw


def _outlines_bent(pipeline: Pipeline):
    @jax.jit
    def draw(params, key, scenes, layouts, tokens, towards):
        del tokens, towards
        images = render(scenes, layouts, xp=jnp)
        level_key, key = jax.random.split(key)
        level = jax.random.uniform(level_key, (len(images),), minval=0.15)
        return tuple(
            _bytes(pipeline, params, _encode(pipeline, params, x))
            for x in (images, warp(key, images, level))
        )

    return draw


def _outlines_morphed(pipeline: Pipeline):
    @jax.jit
    def draw(params, key, scenes, layouts, tokens, towards):
        del tokens
        level = jax.random.uniform(key, (len(scenes.count),), minval=0.15, maxval=0.7)
        images = render(scenes, layouts, xp=jnp), morph(scenes, layouts, towards, level)
        return tuple(_bytes(pipeline, params, _encode(pipeline, params, x)) for x in images)

    return draw


def _encode(pipeline, params, images):
    mean, _ = pipeline.networks["vae"].apply(params["vae"], "encode", 2 * images - 1)
    return mean * pipeline.networks["vae"].config.scaling_factor


def _bytes(pipeline, params, latents):
    return jnp.round(255 * pipeline.decode(params["vae"], latents)).astype(jnp.uint8)
