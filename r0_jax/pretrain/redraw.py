"""One scene twice, both as the VAE draws it: as it is, and with a fault that few denoising steps
leave. What a reward learns from such pairs is the fault: all else is the same."""

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
    """As bytes, to be kept by the thousand."""

    scenes: Scene
    better: UInt8[np.ndarray, "n h w 3"]
    worse: UInt8[np.ndarray, "n h w 3"]

    def take(self, rows: np.ndarray) -> "Pairs":
        return jax.tree.map(lambda field: field[rows], self)


def pairs(pipeline: Pipeline, seed: int, steps: tuple[int, ...], batches: int) -> Pairs:
    """Training scenes, `batches` of 64 for each way to draw the worse half:

    - the scene's latents, noised as far as some step of a grid of `steps` (its first, and those a
      quarter and half of the way), and denoised again on that grid, with guidance and without;
    - the scene with its outlines bent, or on their way to another shape's.
    """
    ways = [_outlines_bent(pipeline), _outlines_morphed(pipeline)]
    for count, guidance in itertools.product(steps, GUIDANCE):
        redrawn = _redrawn(pipeline, count, guidance)  # compiled once for all places to start
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
    """As the other ways, after the number of the step that denoising starts with."""
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
