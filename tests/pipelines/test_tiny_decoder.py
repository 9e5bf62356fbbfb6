"""What rewards look at when a TAESD decodes it: against stock pipelines, and in a training step."""

import dataclasses
import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import step_world
import tiny
import torch
from diffusers import AutoencoderTiny as TorchTiny
from step_world import assert_close, batch

from r0_jax.errors import InputError
from r0_jax.method.objective import Objective
from r0_jax.method.reward_step import Drawn
from r0_jax.pipelines import families, tiny_decoder
from r0_jax.stand_ins import miniature
from r0_jax.weights import lazy

# diffusers 0.42's Euler under numpy 2: np.array(torch tensor).
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"
)

TAESD = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
FAMILIES = {
    "StableDiffusionPipeline": 4,
    "StableDiffusionXLPipeline": 4,
    "StableDiffusion3Pipeline": 16,
    "ZImagePipeline": 16,
}


def write(folder, seed=0, **fields):
    module = tiny.randomize(TorchTiny(**TAESD | fields), seed)
    module.save_pretrained(folder)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for family in FAMILIES:
        miniature.write(root / family, family)
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    # Z-Image's folder does not say its size.
    return functools.cache(lambda family: families.load(folders / family).sized(16, 16))


@pytest.mark.parametrize("family, channels", FAMILIES.items())
@pytest.mark.parametrize(
    "fields", [{}, {"scaling_factor": 0.7, "shift_factor": 0.4}], ids=["published", "scaled"]
)
def test_images_are_those_of_a_stock_pipeline_with_this_vae(
    folders, loaded, tmp_path, family, channels, fields
):
    vae = write(tmp_path, latent_channels=channels, **fields)
    pipe = getattr(diffusers, family).from_pretrained(folders / family, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    pipeline = loaded(family)
    noise = parity.normal(0, 1, *pipeline.latent_shape)
    with torch.no_grad():
        latents, images = (
            pipe(
                "a red circle",
                num_inference_steps=2,
                guidance_scale=0.0 if family == "ZImagePipeline" else 1.0,
                height=16,
                width=16,
                latents=parity.to_torch(noise),
                output_type=kind,
            ).images
            for kind in ("latent", "np")
        )
    decoder = tiny_decoder.load(tmp_path, pipeline)
    decoded = jax.jit(decoder.decode_unclipped)(
        lazy.place(decoder.params), jnp.asarray(parity.to_jax(latents))
    )
    assert decoded.shape == (1, *pipeline.image_shape)
    assert np.mean((images > 0) & (images < 1)) > 0.3, "saturated: tests little"
    np.testing.assert_allclose(np.clip(decoded, 0, 1), images, atol=2e-5)


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"latent_channels": 16},
            "decodes latents of 16 channels, but the vae of .* of 4 channels",
        ),
        (
            {"decoder_block_out_channels": (8, 8, 8), "num_decoder_blocks": (1, 1, 1)},
            "decodes a pixel of latents to 4 x 4, but the vae of .* a pixel of latents to 2 x 2",
        ),
        ({"upsampling_scaling_factor": 3}, "to 3 x 3, but"),
        ({"out_channels": 1}, "decodes images of 1 channels, but the vae of .* images of 3"),
    ],
)
def test_a_decoder_of_other_latents_is_refused_before_its_weights_are_read(
    loaded, tmp_path, fields, said
):
    write(tmp_path, **fields)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=f"^objective.decoder=.*{said}") as error:
        tiny_decoder.load(tmp_path, loaded("StableDiffusionPipeline"))
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_that_holds_none(folders, loaded, tmp_path):
    pipeline = loaded("StableDiffusionPipeline")
    with pytest.raises(InputError, match="is of class AutoencoderKL, not AutoencoderTiny"):
        tiny_decoder.load(folders / "StableDiffusionPipeline" / "vae", pipeline)
    with pytest.raises(InputError, match=r"config\.json is missing"):
        tiny_decoder.load(tmp_path / "nothing", pipeline)
    write(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="diffusion_pytorch_model"):
        tiny_decoder.load(tmp_path, pipeline)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"act_fn": "gelu"}), "utf-8")
    with pytest.raises(InputError, match="act_fn"):
        tiny_decoder.load(tmp_path, pipeline)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A world with a tiny decoder beside its VAE, and one that has it for its VAE."""
    folder = tmp_path_factory.mktemp("taesd")
    write(folder, seed=3)
    world = step_world.make()
    decoder = tiny_decoder.load(folder, world.pipeline)
    params = lazy.place(decoder.params)
    beside = world._replace(
        objective=Objective(
            world.pipeline, world.generator, step_world.REWARDS, world.config, decoder
        ),
        frozen=world.frozen | {"decoder": params},
    )
    replaced = dataclasses.replace(
        world.pipeline, networks=world.pipeline.networks | {"vae": decoder.network}
    )
    instead = world._replace(
        pipeline=replaced,
        objective=Objective(replaced, world.generator, step_world.REWARDS, world.config),
        frozen=world.frozen | {"vae": params},
    )
    return world, beside, instead


def test_the_gradient_is_that_of_a_pipeline_whose_vae_it_is(worlds):
    results = [world.value_and_grad(world.params(), batch(3), last=3) for world in worlds]
    (_, with_vae), (_, beside), (_, instead) = results
    assert_close(results[1], results[2])
    name = next(iter(with_vae))
    assert np.abs(with_vae[name] - beside[name]).max() > 0.01 * np.abs(with_vae[name]).max()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(instead))


def test_training_raises_what_the_rewards_see_through_it(worlds):
    """Steps along the gradient, which the VAE, left out of the program, has no part in."""
    world = worlds[1]
    frozen = {name: value for name, value in world.frozen.items() if name != "vae"}
    step = jax.jit(jax.value_and_grad(world.objective.loss, has_aux=True))
    params, keys = world.params(), step_world.sample_keys(4)
    rewards = []
    for _ in range(4):
        (_, metrics), grads = step(params, frozen, batch(4), keys, Drawn(3), {})
        rewards.append(float(metrics["reward/agreement"]))
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads.values()))
        params = jax.tree.map(lambda p, g, norm=norm: p - 0.2 * g / norm, params, grads)
    assert rewards[-1] > rewards[0]
