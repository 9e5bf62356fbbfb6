import jax
import numpy as np
import pytest
from step_world import batch, make

from r0_jax.diffusion import grid
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.parallel import sharding


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_batches_are_split_over_all_devices_and_images_stay_the_same(guidance_scale, monkeypatch):
    world = make()
    pipeline, mesh = world.pipeline, sharding.local_mesh()
    monkeypatch.setattr(type(pipeline), "tokenize", lambda self, prompts: world.frozen["empty"])
    scheduler = grid.grid(pipeline.scheduler_config, 2)
    noise, keys = fixed_noise(0, 8, pipeline.latent_shape)
    params = {part: world.frozen[part] for part in ("vae", "text_encoder")}
    params["unet"] = world.frozen["base"]
    tokens = {"input_ids": batch(8)["input_ids"]}

    everywhere = jax.device_put(params, sharding.replicated(mesh))
    split = ImageSampler(pipeline, scheduler, guidance_scale, mesh=mesh)
    alone = ImageSampler(pipeline, scheduler, guidance_scale)
    for size in (8, 6):  # the devices are eight: six samples are drawn by each of them
        some = {"input_ids": tokens["input_ids"][:size]}
        drawn = split(everywhere, some, noise[:size], keys[:size])
        expected = alone(params, some, noise[:size], keys[:size])
        assert drawn.is_fully_replicated and len(drawn.devices()) == len(jax.devices()) == 8
        np.testing.assert_allclose(drawn, expected, atol=1e-5)

    program = split.run.lower(everywhere, tokens, noise, keys).compile().as_text()
    assert f"f32[1,{','.join(map(str, pipeline.latent_shape))}]" in program  # a sample a device
