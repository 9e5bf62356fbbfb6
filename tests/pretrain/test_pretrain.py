"""The pretraining of the embedded world: its data, its loop, and each stage from end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import shapes_base
from r0_jax import rewards
from r0_jax.config import reward_entry
from r0_jax.errors import InputError
from r0_jax.pipelines import stable_diffusion
from r0_jax.pretrain import clip, preference, redraw, text
from r0_jax.pretrain.degrade import degrade, morph, warp
from r0_jax.pretrain.fit import fit
from r0_jax.pretrain.stages import STAGES
from r0_jax.shapes import CHECKPOINTS
from r0_jax.shapes.captions import caption, captions_for, parse
from r0_jax.shapes.judge import judge
from r0_jax.shapes.scene import Scene, render, sample_scenes, split_of


def scenes_of(batch: Scene) -> list[Scene]:
    return [Scene(*fields) for fields in zip(*batch, strict=True)]


def test_answers_are_what_the_caption_says():
    scenes = sample_scenes(np.random.default_rng(0), 64, "train")
    expected = text.answers(scenes)
    for row, scene in zip(expected, scenes_of(scenes), strict=True):
        for language in ("en", "zh"):
            read = parse(caption(scene, language, 0))
            single = Scene(*(np.asarray(field)[None] for field in read))
            np.testing.assert_array_equal(text.answers(single)[0], row)
    assert (expected < np.asarray(text.QUESTIONS)).all() and (expected >= 0).all()


def test_near_misses_differ_in_one_thing_and_never_leave_the_training_split():
    rng = np.random.default_rng(1)
    scenes = sample_scenes(rng, 512, "train")
    other = clip.near_miss(rng, scenes)
    assert (split_of(other) == 0).all()
    differs = (text.answers(scenes) != text.answers(other)).sum(1)
    assert (differs > 0).mean() > 0.9  # a relation may be turned into itself
    # One attribute, or (a relation turned round: the objects change places) up to all of them.
    assert np.mean(differs == 1) > 0.4


def test_equal_scenes_have_equal_identities_and_others_do_not():
    rng = np.random.default_rng(2)
    scenes = clip.hard_scenes(rng, 128)
    numbers = clip.identity(scenes)
    keys = [tuple(row) for row in text.answers(scenes)]
    assert len(set(keys)) == len(set(numbers.tolist())) == len(set(zip(keys, numbers, strict=True)))


@pytest.mark.parametrize("worsen", [degrade, warp])
def test_degrading_does_nothing_at_level_0_and_more_at_higher_levels(worsen):
    images = jax.random.uniform(jax.random.key(0), (8, 16, 16, 3))
    errors = [
        float(jnp.mean(jnp.abs(worsen(jax.random.key(1), images, jnp.full(8, level)) - images)))
        for level in (0.0, 0.3, 1.0)
    ]
    assert errors[0] < 1e-6 < errors[1] < errors[2]


def test_warping_moves_outlines_and_invents_no_colours():
    images = np.zeros((4, 64, 64, 3), np.float32)
    images[:, 20:44, 20:44] = 1.0
    bent = np.asarray(warp(jax.random.key(0), jnp.asarray(images), jnp.full(4, 0.3)))
    moved = np.abs(bent - images).max(axis=(0, 3)) > 0.1
    assert moved.any() and not moved[26:38, 26:38].any() and not moved[:14].any()
    np.testing.assert_array_equal(bent[..., :1].repeat(3, -1), bent)


def test_morphing_goes_from_one_shape_to_another():
    scenes, layouts = clip.training_batch(np.random.default_rng(3), 16)
    towards = clip.other_shapes(np.random.default_rng(4), scenes)
    assert (towards != scenes.shape).all()
    start, half, end = (
        morph(scenes, layouts, towards, jnp.full(16, level)) for level in (0.0, 0.5, 1.0)
    )
    np.testing.assert_allclose(start, render(scenes, layouts), atol=2e-5)
    np.testing.assert_allclose(end, render(scenes._replace(shape=towards), layouts), atol=2e-5)
    for other in (start, end):
        assert (jnp.max(jnp.abs(half - other), axis=(1, 2, 3)) > 0.3).all()


def test_redrawn_pairs_show_the_same_scene_and_differ_the_more_the_more_is_redrawn():
    pipeline = stable_diffusion.load(CHECKPOINTS / "pipeline")
    made = redraw.pairs(pipeline, seed=0, steps=(4,), batches=1)
    assert made.better.shape == made.worse.shape == (8 * 64, 64, 64, 3)
    captions = captions_for(made.scenes, np.random.default_rng(0))
    assert judge(made.better / 255, captions).correct.mean() > 0.95
    right = judge(made.worse / 255, captions).correct.reshape(8, 64).mean(1)
    bent, plain, guided = right[:2], right[2:5], right[5:]
    assert plain[0] < plain[1] < plain[2] and (guided > plain).any() and (bent < 0.8).all()
    differs = np.abs(made.better / 255 - made.worse / 255).reshape(8, -1).mean(1)[2:5]
    assert differs[0] > differs[1] > differs[2] > 0


def test_positions_of_another_image_size_are_those_of_the_same_places():
    old = jnp.asarray(np.random.default_rng(0).standard_normal((1 + 9, 4)), jnp.float32)
    name = "vision_model.embeddings.position_embedding.embedding"
    vision = {"image_size": 24, "patch_size": 8}
    new = preference._resize_positions({name: old}, vision, 72)[name]
    assert new.shape == (1 + 81, 4)
    np.testing.assert_array_equal(new[0], old[0])
    middles = new[1:].reshape(9, 9, 4)[1::3, 1::3]
    np.testing.assert_allclose(middles, old[1:].reshape(3, 3, 4), atol=1e-5)


def quadratic(**fields) -> ConfigDict:
    return shapes_base.training(
        steps=300, warmup_steps=10, learning_rate=0.1, log_every=300, ema_decay=0.9, **fields
    )


def test_fit_minimizes_and_returns_the_average():
    def loss(params, batch, key):
        del key
        return jnp.sum((params["x"] - batch["target"].mean(0)) ** 2), {}

    def batches():
        while True:
            yield {"target": np.full((8, 3), 2.0, np.float32)}

    seen = []
    params = fit(
        loss,
        {"x": jnp.zeros(3)},
        batches(),
        quadratic(eval_every=100),
        lambda step, average: seen.append(step),
    )
    np.testing.assert_allclose(params["x"], 2.0, atol=1e-2)
    assert seen == [100, 200, 300]


def test_fit_names_a_warm_up_that_does_not_fit():
    config = quadratic()
    config.warmup_steps = 300
    with pytest.raises(InputError, match="steps=300 must be more than warmup_steps=300"):
        fit(lambda *_: None, {}, iter(()), config)


def tiny_config(stage: str) -> ConfigDict:
    """The stage with two steps and a network of a few thousand weights."""
    config = shapes_base.get_config(stage)
    tower = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
    )
    networks = {
        "vae": dict(block_out_channels=[4, 4, 8, 8], norm_num_groups=2, latent_channels=4),
        "text_encoder": tower,
        "unet": dict(
            block_out_channels=[8, 16],
            norm_num_groups=4,
            attention_head_dim=[2, 2],
            cross_attention_dim=16,
            in_channels=4,
            out_channels=4,
        ),
        "clip": dict(projection_dim=8),
        "heldout_clip": dict(projection_dim=8),
    }
    with config.unlocked():
        if stage in networks:
            config.network.update(networks[stage])
        if "clip" in stage:
            config.network.text_config.update(tower)
            config.network.vision_config.update(tower | {"patch_size": 16})
        if stage != "tokenizer":
            config.update(
                steps=2,
                warmup_steps=1,
                log_every=1,
                eval_every=2,
                batch_size=16 if stage == "preference" else 8,
            )
        for field, value in (
            ("scenes", 128),
            ("eval_prompts", 2),
            ("few_step_images", 64),
            ("kept_batches", 1),
            ("few_steps", (2,)),
        ):
            if field in config:
                config[field] = value
    return config


def test_every_stage_makes_what_the_next_one_needs(tmp_path):
    for stage, train in STAGES.items():
        train(tiny_config(stage), tmp_path)
    pipeline = stable_diffusion.load(tmp_path / "pipeline")
    assert pipeline.image_shape == (64, 64, 3)
    assert len(pipeline.tokenizers["tokenizer"]) > 300
    for name in ("clip", "heldout_clip", "preference"):
        reward = rewards.load(name, reward_entry("clip_score", path=str(tmp_path / name)))
        features = reward.text_features(reward.params, ["a large red circle", "一个小的蓝色圆形"])
        assert features.shape == (2, 8)
    head = str(tmp_path / "aesthetic" / "model.safetensors")
    aesthetic = reward_entry("aesthetic", path=str(tmp_path / "preference"), head=head)
    assert rewards.load("aesthetic", aesthetic).text_features is None
    # A further leg begins where the one before ended.
    config = tiny_config("vae")
    config.warm_start, config.learning_rate, config.ema_decay = True, 0.0, 0.0
    path = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    before = load_file(path)
    STAGES["vae"](config, tmp_path)
    after = load_file(path)
    assert all((before[name] == after[name]).all() for name in before)
