"""Stages `preference` and `aesthetic`: rewards of the embedded world.

The preference model says which image of a pair fits the prompt better. The aesthetic model rates
the quality of an image without its prompt.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from r0_jax.diffusion import grid
from r0_jax.evaluation.batches import draw
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.files import read_json
from r0_jax.models.score_mlp import ScoreMLP
from r0_jax.pipelines import stable_diffusion
from r0_jax.pipelines.pipeline import take
from r0_jax.pipelines.tokenizers import load_tokenizer, tokenize
from r0_jax.pretrain import clip, redraw
from r0_jax.pretrain.degrade import degrade, morph, warp
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.text import CAPTION_LENGTH
from r0_jax.rewards import tower
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.rewards.tower import normalize
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import render, sample_layouts, sample_scenes
from r0_jax.weights import convert, lazy
from r0_jax.weights.network import Network, Params, init

# Faults of the worse image of a rendered pair.
_KINDS = ("degraded", "bent", "morphed", "near_miss")
_DRAWN_AT_ONCE = 64


def train_preference(config: ConfigDict, out: Path) -> None:
    """Train the `clip` stage's model on pairs, as HPS trained CLIP; write `out/preference`.

    Half of the pairs are rendered. The worse image is degraded, bent or morphed; the better image
    has less of the same fault, or none. Or the worse image is a near miss of the prompt. The
    other half of the pairs went through the VAE (see `redraw`).
    """
    source = out / ("preference" if config.warm_start else "clip")
    found = tower.load(source)
    network = found.network
    fields = read_json(source / "config.json")
    params = _resize_positions(lazy.place(found.params), fields["vision_config"], config.image_size)
    prepare = Preprocess(config.image_size)
    tokenizer = load_tokenizer(source)

    def loss(params, batch, key):
        rendered, kept = _rendered_pairs(batch["rendered"], key), batch["kept"]
        better, worse = (
            jnp.concatenate([first, second / 255])
            for first, second in zip(rendered, (kept.better, kept.worse), strict=True)
        )
        text = normalize(network.apply(params, "text_features", batch["input_ids"]))
        images = prepare(jnp.concatenate([better, worse]))
        better, worse = jnp.split(normalize(network.apply(params, "image_features", images)), 2)
        margin = jnp.exp(params["logit_scale"]) * jnp.sum((better - worse) * text, axis=-1)
        of_rendered, of_redrawn = jnp.split(margin > 0, 2)
        return -jnp.mean(jax.nn.log_sigmoid(margin)), {
            "rendered": jnp.mean(of_rendered),
            "redrawn": jnp.mean(of_redrawn),
        }

    pipeline = stable_diffusion.load(out / "pipeline")
    kept = redraw.pairs(pipeline, config.seed, config.few_steps, config.kept_batches)
    console.print(f"drew {len(kept.better)} pairs")
    params = fit(loss, params, _pairs(config, tokenizer, kept), config)
    fields["vision_config"]["image_size"] = config.image_size
    clip.write(out, config, fields, params)


def _rendered_pairs(batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Render better and worse images [B, h, w, 3].

    Both images of a pair have the same fault in the same direction. So the model learns that less
    of a fault is better.
    """
    level_key, share_key, degrade_key, warp_key = jax.random.split(key, 4)
    scenes, layouts, count = batch["scenes"], batch["layouts"], len(batch["kind"])
    more = jax.random.uniform(level_key, (count,), minval=0.1)
    less = more * jnp.maximum(jax.random.uniform(share_key, (count,), minval=-1.0), 0) ** 0.5 * 0.8
    clean = render(scenes, layouts, xp=jnp)
    better, worse = (
        jnp.stack(
            [
                degrade(degrade_key, clean, level),
                warp(warp_key, clean, level),
                morph(scenes, layouts, batch["towards"], 0.8 * level),
                clean,
            ]
        )
        for level in (less, more)
    )
    worse = worse.at[_KINDS.index("near_miss")].set(
        render(batch["wrong"], batch["wrong_layouts"], xp=jnp)
    )
    rows = jnp.arange(count)
    return better[batch["kind"], rows], worse[batch["kind"], rows]


def _resize_positions(params: Params, vision: dict, size: int) -> Params:
    """Resize the position embeddings of a ViT to images of `size` pixels (cubic)."""
    name = "vision_model.embeddings.position_embedding.embedding"
    old, new = (side // vision["patch_size"] for side in (vision["image_size"], size))
    first, rest = params[name][:1], params[name][1:]
    width = rest.shape[-1]
    rest = jax.image.resize(rest.reshape(old, old, width), (new, new, width), "cubic")
    return {**params, name: jnp.concatenate([first, rest.reshape(new * new, width)])}


def _few_step_pool(out: Path, config: ConfigDict) -> np.ndarray:
    """Draw training scenes with the base model without guidance; return images in [0, 1].

    Use each number of steps in `config.few_steps` for an equal share.
    """
    rng = np.random.default_rng(config.seed)
    scenes = sample_scenes(rng, config.few_step_images, "train")
    pipeline = stable_diffusion.load(out / "pipeline")
    tokens = pipeline.tokenize(captions_for(scenes, rng))
    count = config.few_step_images
    noise, keys = fixed_noise(config.seed, count, pipeline.latent_shape)
    params = lazy.place(pipeline.params)
    drawn = []
    for steps, rows in zip(
        config.few_steps, np.array_split(np.arange(count), len(config.few_steps)), strict=True
    ):
        scheduler = grid.grid(pipeline.scheduler_config, steps)
        sampler = ImageSampler(pipeline, scheduler, guidance_scale=1.0)
        drawn.append(
            draw(sampler, params, take(tokens, rows), noise[rows], keys[rows], _DRAWN_AT_ONCE)
        )
    console.print(f"drew {count} images in few steps")
    return np.concatenate(drawn)


def _pairs(config: ConfigDict, tokenizer: CLIPTokenizer, kept: redraw.Pairs) -> Iterator[dict]:
    rng = np.random.default_rng(config.seed + 1)
    half = config.batch_size // 2
    while True:
        scenes, layouts = clip.training_batch(rng, half)
        wrong = clip.near_miss(rng, scenes)
        chosen = kept.take(rng.integers(len(kept.better), size=half))
        captions = captions_for(scenes, rng) + captions_for(chosen.scenes, rng)
        yield {
            "rendered": {
                "scenes": scenes,
                "layouts": layouts,
                "wrong": wrong,
                "wrong_layouts": sample_layouts(rng, wrong),
                "towards": clip.other_shapes(rng, scenes),
                "kind": rng.integers(len(_KINDS), size=half),
            },
            "kept": chosen,
            "input_ids": tokenize(tokenizer, captions, CAPTION_LENGTH),
        }


def train_aesthetic(config: ConfigDict, out: Path) -> None:
    """Train an MLP on the `preference` tower's image features; write it to `out/aesthetic`.

    The target runs from 1 (fully degraded or bent) to 10 (clean). It is 4 for images that the base
    model draws in few steps.
    """
    found = tower.load(out / "preference", text=False)
    tower_params = lazy.place(found.params)

    def constructor(rngs):
        return ScoreMLP(found.width, rngs=rngs)

    head = Network.abstract(constructor)

    def loss(params, batch, key):
        level_key, degrade_key, warp_key, which_key = jax.random.split(key, 4)
        clean = render(batch["scenes"], batch["layouts"], xp=jnp)
        level = jnp.maximum(jax.random.uniform(level_key, (len(clean),), minval=-0.3), 0.0)
        drawn = batch["from_base"][:, None, None, None]
        bent = jax.random.bernoulli(which_key, 0.3, drawn.shape)
        worse = jnp.where(bent, warp(warp_key, clean, level), degrade(degrade_key, clean, level))
        images = jnp.where(drawn, batch["few_step"], worse)
        target = jnp.where(batch["from_base"], 4.0, 10.0 - 9.0 * level)
        # The tower is frozen; only the head is trained.
        features = normalize(
            found.sight.apply(tower_params, "image_features", found.prepare(images))
        )
        error = head(params, features) - target
        return jnp.mean(error**2), {"mean_abs_error": jnp.mean(jnp.abs(error))}

    pool = _few_step_pool(out, config)
    params = fit(
        loss, init(constructor, jax.random.key(config.seed)), _graded(config, pool), config
    )
    convert.save(params, out / "aesthetic" / "model.safetensors", config.store_dtype)


def _graded(config: ConfigDict, pool: np.ndarray) -> Iterator[dict]:
    rng = np.random.default_rng(config.seed + 1)
    while True:
        scenes, layouts = clip.training_batch(rng, config.batch_size)
        yield {
            "scenes": scenes,
            "layouts": layouts,
            "few_step": pool[rng.integers(len(pool), size=config.batch_size)],
            "from_base": rng.random(config.batch_size) < 0.25,
        }
