"""What the repository ships: that stock PyTorch libraries read it, draw and judge the same."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from configs import shapes_r0
from r0_jax import rewards
from r0_jax.diffusion import schedulers
from r0_jax.evaluation import world
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.pipelines import stable_diffusion
from r0_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD
from r0_jax.shapes import CHECKPOINTS, PROMPTS
from r0_jax.shapes.captions import parse, prompts
from r0_jax.shapes.judge import judge
from r0_jax.shapes.scene import SPLITS, Scene, split_of
from r0_jax.weights import lazy

FOUR = ["a large red circle", "一个小的蓝色十字形", *prompts("test", 2, seed=5)]
MEGABYTES = 20


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion.load(CHECKPOINTS / "pipeline")


def test_size():
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*")) < MEGABYTES * 1e6


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_of_their_split_in_both_languages(split):
    lines = (PROMPTS / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    assert lines == prompts(split, len(lines), seed=0)
    scenes = Scene(*(np.stack(x) for x in zip(*(parse(line) for line in lines), strict=True)))
    assert (split_of(scenes) == SPLITS.index(split)).all()
    assert 0.4 < np.mean([line.isascii() for line in lines]) < 0.6


def test_stock_diffusers_draws_the_same_images(pipeline):
    noise, keys = fixed_noise(3, len(FOUR), pipeline.latent_shape)
    sampler = ImageSampler(pipeline, schedulers.from_config(pipeline.scheduler_config, 4), 2.0)
    ours = np.asarray(sampler(lazy.place(pipeline.params), pipeline.tokenize(FOUR), noise, keys))
    stock = diffusers.StableDiffusionPipeline.from_pretrained(CHECKPOINTS / "pipeline")
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        FOUR,
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="np",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    ).images
    assert np.abs(ours - theirs).max() < 2 / 255
    assert ours.std() > 0.1


@pytest.mark.parametrize("name", ["clip_score", "preference", "heldout_clip"])
def test_transformers_gives_the_same_scores(name):
    config = shapes_r0.get_config()
    entry = config.rewards.get(name) or config.heldout_rewards[name]
    reward = rewards.load(name, entry)
    model = CLIPModel.from_pretrained(entry.path, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(entry.path)
    size = model.config.vision_config.image_size  # its own, so that nothing is resized
    images = np.random.default_rng(0).random((len(FOUR), size, size, 3), np.float32)
    pixels = ((images - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD)).astype(np.float32)
    ids = tokenizer(FOUR, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), **ids)
    cosine = (theirs.image_embeds * theirs.text_embeds).sum(-1).numpy()
    features = jnp.asarray(reward.text_features(reward.params, FOUR))
    ours = reward.score(lazy.place(reward.params), jnp.asarray(images), features)
    np.testing.assert_allclose(ours, cosine, atol=1e-5)


def test_rewards_tell_scenes_from_other_scenes_and_from_noise():
    config = shapes_r0.get_config()
    captions = prompts("validation", 64, seed=3)
    clean, other = world.render_prompts(captions, 1), world.render_prompts(captions[::-1], 2)
    noisy = np.clip(clean + 0.2 * np.random.default_rng(0).standard_normal(clean.shape), 0, 1)
    for name, entry in {**config.rewards, **config.heldout_rewards}.items():
        reward = rewards.load(name, entry)
        features = reward.text_features and reward.text_features(reward.params, captions)
        score = jax.jit(reward.score)

        def mean(images, score=score, reward=reward, features=features):
            return score(lazy.place(reward.params), images.astype(np.float32), features)

        if name == "aesthetic":
            assert np.mean(mean(clean) > mean(noisy)) > 0.95
        else:
            assert np.mean(mean(clean) > mean(other)) > 0.95, name


def test_the_base_draws_what_it_is_asked_for(pipeline):
    captions = prompts("test", 32, seed=7)
    noise, keys = fixed_noise(4, len(captions), pipeline.latent_shape)
    scheduler = schedulers.from_config(pipeline.scheduler_config, 25)
    sampler = ImageSampler(pipeline, scheduler, shapes_r0.get_config().test.guidance_scale)
    drawn = sampler(lazy.place(pipeline.params), pipeline.tokenize(captions), noise, keys)
    assert judge(np.asarray(drawn), captions).correct.mean() > 0.6
