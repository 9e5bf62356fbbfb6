"""Stages `preference` and `aesthetic`: which image of a pair a person would rather have ordered,
and how well made an image is, whatever was ordered."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from r0_jax import convert, few_step, lazy
from r0_jax.inference import ImageSampler
from r0_jax.models.config import read_json
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.network import Network, init
from r0_jax.pipelines import stable_diffusion
from r0_jax.pipelines.pipeline import take
from r0_jax.pipelines.tokenizers import load_tokenizer, tokenize
from r0_jax.pretrain import clip
from r0_jax.pretrain.degrade import degrade, warp
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.text import CAPTION_LENGTH
from r0_jax.rewards import tower
from r0_jax.rewards.tower import normalize
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import Scene, render, sample_layouts, sample_scenes
from r0_jax.validation import draw, fixed_noise

_DRAWN_AT_ONCE = 64


def train_preference(config: ConfigDict, out: Path) -> None:
    """Writes `out/preference`: the `clip` stage's model, taught by pairs as HPS was from CLIP.

    The better image is a clean scene of the prompt. The worse one is the same scene degraded or
    bent, a near miss of it, or what the base draws of the prompt in few steps.
    """
    network, params, _, prepare, *_ = tower.load(out / "clip")
    params = lazy.place(params)
    tokenizer = load_tokenizer(out / "clip")

    def loss(params, batch, key):
        level_key, degrade_key, warp_key = jax.random.split(key, 3)
        better = render(batch["scenes"], batch["layouts"], xp=jnp)
        level = jax.random.uniform(level_key, (len(better),), minval=0.05)
        worse = jnp.stack([degrade(degrade_key, better, level), warp(warp_key, better, level),
                           render(batch["wrong"], batch["wrong_layouts"], xp=jnp),
                           batch["few_step"]])
        worse = worse[batch["kind"], jnp.arange(len(better))]
        images = prepare(jnp.concatenate([better, worse]))
        image = normalize(network.apply(params, "image_features", images))
        text = normalize(network.apply(params, "text_features", batch["input_ids"]))
        scores = jnp.sum(image.reshape(2, *text.shape) * text[None], axis=-1)  # [2, B]
        margin = jnp.exp(params["logit_scale"]) * (scores[0] - scores[1])
        return -jnp.mean(jax.nn.log_sigmoid(margin)), {"accuracy": jnp.mean(margin > 0)}

    pool, pool_scenes = _few_step_pool(out, config)
    params = fit(loss, params, _pairs(config, tokenizer, pool, pool_scenes), config)
    clip.write(out, config, read_json(out / "clip" / "config.json"), params)


def _few_step_pool(out: Path, config: ConfigDict) -> tuple[np.ndarray, Scene]:
    """What the base draws without guidance, in each of config.few_steps as often: images in [0, 1],
    and what was asked for, all of it training scenes."""
    rng = np.random.default_rng(config.seed)
    scenes = sample_scenes(rng, config.few_step_images, "train")
    pipeline = stable_diffusion.load(out / "pipeline")
    tokens = pipeline.tokenize(captions_for(scenes, rng))
    count = config.few_step_images
    noise, keys = fixed_noise(config.seed, count, pipeline.latent_shape)
    params = lazy.place(pipeline.params)
    drawn = []
    for steps, rows in zip(config.few_steps, np.array_split(np.arange(count),
                                                            len(config.few_steps)), strict=True):
        grid = few_step.grid(pipeline.scheduler_config, steps)
        sampler = ImageSampler(pipeline, grid, guidance_scale=1.0)
        drawn.append(draw(sampler, params, take(tokens, rows), noise[rows], keys[rows],
                          _DRAWN_AT_ONCE))
    console.print(f"drew {count} images in few steps")
    return np.concatenate(drawn), scenes


def _pairs(config: ConfigDict, tokenizer: CLIPTokenizer, pool: np.ndarray, pool_scenes: Scene
           ) -> Iterator[dict]:
    rng = np.random.default_rng(config.seed + 1)
    while True:
        rows = rng.integers(len(pool), size=config.batch_size)
        scenes = Scene(*(field[rows] for field in pool_scenes))
        wrong = clip.near_miss(rng, scenes)
        yield {"scenes": scenes, "layouts": sample_layouts(rng, scenes),
               "wrong": wrong, "wrong_layouts": sample_layouts(rng, wrong),
               "few_step": pool[rows], "kind": rng.integers(4, size=config.batch_size),
               "input_ids": tokenize(tokenizer, captions_for(scenes, rng), CAPTION_LENGTH)}


def train_aesthetic(config: ConfigDict, out: Path) -> None:
    """Writes `out/aesthetic/model.safetensors`: the MLP head on the `preference` tower's image
    features, from 1 (fully degraded or bent) to 10 (clean); the base in few steps counts as 4."""
    network, tower_params, _, prepare, inputs, _ = tower.load(out / "preference")

    def constructor(rngs):
        return ScoreMLP(inputs, rngs=rngs)

    head = Network.abstract(constructor)
    tower_params = lazy.place(tower_params)

    def loss(params, batch, key):
        level_key, degrade_key, warp_key, which_key = jax.random.split(key, 4)
        clean = render(batch["scenes"], batch["layouts"], xp=jnp)
        level = jnp.maximum(jax.random.uniform(level_key, (len(clean),), minval=-0.3), 0.0)
        drawn = batch["from_base"][:, None, None, None]
        bent = jax.random.bernoulli(which_key, 0.3, drawn.shape)
        worse = jnp.where(bent, warp(warp_key, clean, level), degrade(degrade_key, clean, level))
        images = jnp.where(drawn, batch["few_step"], worse)
        target = jnp.where(batch["from_base"], 4.0, 10.0 - 9.0 * level)
        # The tower is frozen: only the head is trained.
        features = normalize(network.apply(tower_params, "image_features", prepare(images)))
        error = head(params, features) - target
        return jnp.mean(error**2), {"mean_abs_error": jnp.mean(jnp.abs(error))}

    pool, _ = _few_step_pool(out, config)
    params = fit(loss, init(constructor, jax.random.key(config.seed)), _graded(config, pool),
                 config)
    convert.save(params, out / "aesthetic" / "model.safetensors", config.store_dtype)


def _graded(config: ConfigDict, pool: np.ndarray) -> Iterator[dict]:
    rng = np.random.default_rng(config.seed + 1)
    while True:
        scenes, layouts = clip.training_batch(rng, config.batch_size)
        yield {"scenes": scenes, "layouts": layouts,
               "few_step": pool[rng.integers(len(pool), size=config.batch_size)],
               "from_base": rng.random(config.batch_size) < 0.25}
