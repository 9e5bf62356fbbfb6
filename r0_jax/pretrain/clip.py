"""Stages `clip` and `heldout_clip`: contrastive training on scenes and captions."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.pipelines.tokenizers import load_tokenizer, tokenize
from r0_jax.pretrain.degrade import degrade
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.folders import copy_tokenizer, write_json
from r0_jax.pretrain.text import CAPTION_LENGTH, special_tokens
from r0_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from r0_jax.rewards.tower import normalize
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import (
    COLOURS,
    SHAPES,
    Layout,
    Scene,
    canonical,
    render,
    sample_layouts,
    sample_scenes,
    split_of,
)
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, init

_MAX_LOGIT_SCALE = np.log(100.0)  # as in CLIP
GROUP = 4  # one scene and three near misses


def train(config: ConfigDict, out: Path) -> None:
    """Train a CLIPModel; write the transformers folder `out/<config.name>`."""
    tokenizer = load_tokenizer(out / "pipeline" / "tokenizer")
    fields = network_fields(config, tokenizer)
    parsed = CLIPConfig.from_json(fields)

    def constructor(rngs):
        return CLIPModel(parsed, rngs=rngs)

    network = Network.abstract(constructor)
    prepare = Preprocess(parsed.vision_config.image_size)

    def loss(params, batch, key):
        """Return the symmetric cross-entropy; captions of equal scenes share the target."""
        level_key, key = jax.random.split(key)
        images = render(batch["scenes"], batch["layouts"], xp=jnp)
        level = config.augmentation * jax.random.uniform(level_key, (len(images),)) ** 2
        images = prepare(degrade(key, images, level))
        image = normalize(network.apply(params, "image_features", images))
        text = normalize(network.apply(params, "text_features", batch["input_ids"]))
        scale = jnp.exp(jnp.minimum(params["logit_scale"], _MAX_LOGIT_SCALE))
        logits = scale * image @ text.T
        same = batch["identity"][:, None] == batch["identity"][None, :]
        target = same / jnp.sum(same, axis=1, keepdims=True)
        value = (
            optax.softmax_cross_entropy(logits, target).mean()
            + optax.softmax_cross_entropy(logits.T, target).mean()
        ) / 2
        right = jnp.take_along_axis(same, jnp.argmax(logits, axis=1)[:, None], axis=1)
        return value, {"accuracy": jnp.mean(right), "scale": scale}

    params = fit(
        loss, init(constructor, jax.random.key(config.seed)), batches(config, tokenizer), config
    )
    params["logit_scale"] = np.asarray(
        np.minimum(params["logit_scale"], _MAX_LOGIT_SCALE), np.float32
    )
    write(out, config, fields, params)


def network_fields(config: ConfigDict, tokenizer: CLIPTokenizer) -> dict:
    """Return the CLIPModel's config.json, with the tokenizer's ids."""
    fields = config.network.to_dict()
    fields["text_config"] |= special_tokens(tokenizer)
    return fields


def write(out: Path, config: ConfigDict, fields: dict, params: Params) -> None:
    """Write the transformers folder: weights, config, image processor and tokenizer."""
    folder = out / config.name
    size = fields["vision_config"]["image_size"]
    convert.save(params, folder / "model.safetensors", config.store_dtype)
    write_json(folder / "config.json", fields)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
    )
    copy_tokenizer(out / "pipeline" / "tokenizer", folder)
    console.print(f"written to {folder}")


def batches(config: ConfigDict, tokenizer: CLIPTokenizer) -> Iterator[dict]:
    """Yield groups of near misses, with captions of random templates and languages.

    Scenes of a group differ in one attribute, so the model must learn colours, shapes, sizes and
    relations.
    """
    rng = np.random.default_rng(config.seed)
    while True:
        scenes = hard_scenes(rng, config.batch_size // GROUP)
        yield {
            "scenes": scenes,
            "layouts": sample_layouts(rng, scenes),
            "identity": identity(scenes),
            "input_ids": tokenize(tokenizer, captions_for(scenes, rng), CAPTION_LENGTH),
        }


def identity(scenes: Scene) -> np.ndarray:
    """Return one int32 per scene; equal scenes have equal numbers."""
    total = np.zeros(len(scenes.count), np.int32)
    for field, base in ((scenes.shape, 4), (scenes.colour, 6), (scenes.size, 2)):
        for i in range(2):
            total = total * base + field[:, i]
    return ((total * 4 + scenes.relation) * 3 + scenes.count).astype(np.int32)


def hard_scenes(rng: np.random.Generator, groups: int) -> Scene:
    """Draw training scenes [groups * GROUP]: `groups` scenes and their near misses."""
    first = sample_scenes(rng, groups, "train")
    parts = [first] + [near_miss(rng, first) for _ in range(GROUP - 1)]
    return Scene(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def near_miss(rng: np.random.Generator, scenes: Scene) -> Scene:
    """Change one attribute of each scene: a shape, a colour, a size, or the relation.

    If the result is not a training scene, or has two equal objects, draw a new training scene.
    """
    n = len(scenes.count)
    shape, colour, size = (field.copy() for field in scenes[:3])
    rows, which = np.arange(n), rng.integers(2, size=n) * (scenes.count == 2)
    what = rng.integers(4, size=n)
    for kind, field, values in ((0, shape, len(SHAPES)), (1, colour, len(COLOURS)), (2, size, 2)):
        changed = (field[rows, which] + rng.integers(1, values, size=n)) % values
        field[rows, which] = np.where(what == kind, changed, field[rows, which])
    pair = scenes.count == 2
    axis = 2 * rng.integers(2, size=n)
    turned = np.where(rng.random(n) < 0.5, scenes.relation ^ 1, axis + rng.integers(2, size=n))
    relation = np.where((what == 3) & pair, turned, scenes.relation).astype(np.int32)
    changed = canonical(Scene(shape, colour, size, scenes.count, relation))
    equal = (
        pair
        & (changed.shape[:, 0] == changed.shape[:, 1])
        & (changed.colour[:, 0] == changed.colour[:, 1])
    )
    bad = equal | (split_of(changed) != 0)
    other = sample_scenes(rng, n, "train")
    return Scene(
        *(
            np.where(bad.reshape(-1, *(1,) * (a.ndim - 1)), b, a)
            for a, b in zip(changed, other, strict=True)
        )
    )


def other_shapes(rng: np.random.Generator, scenes: Scene) -> np.ndarray:
    """Draw a different shape for every object, [b, 2]."""
    return (scenes.shape + rng.integers(1, len(SHAPES), scenes.shape.shape)) % len(SHAPES)


def training_batch(rng: np.random.Generator, n: int) -> tuple[Scene, Layout]:
    """Draw n training scenes with layouts."""
    scenes = sample_scenes(rng, n, "train")
    return scenes, sample_layouts(rng, scenes)
