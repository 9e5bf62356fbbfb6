"""Draws images with a given scheduler and guidance, outside the training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from r0_jax.diffusion import rollout
from r0_jax.diffusion.schedulers import Scheduler
from r0_jax.models import repeat
from r0_jax.parallel import sharding
from r0_jax.pipelines.pipeline import Conditioning, Pipeline, Tokens
from r0_jax.weights.network import Params


def sample_latents(
    pipeline: Pipeline,
    scheduler: Scheduler,
    params: Params,
    latents: Float[Array, "b h w c"],
    conditioning: Conditioning,
    negative: Conditioning | None,
    guidance_scale: float | Float[Array, ""],
    keys: rollout.Keys | None = None,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "b h w c"]:
    """Return latents after the steps of `scheduler` from number `first` on.

    `latents` are as noisy as that step takes them. The first step of all takes init_noise_sigma
    times standard normal noise. With `negative` there is classifier-free guidance,
    uncond + guidance_scale (cond - uncond): one network call a step evaluates both.
    """
    guided = negative is not None
    if guided:
        conditioning = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), negative, conditioning)
    timesteps = jnp.asarray(scheduler.timesteps, jnp.float32)

    def body(i, carry):
        latents, state = carry
        inputs = scheduler.scale_model_input(latents, i)
        inputs = jnp.concatenate([inputs, inputs]) if guided else inputs
        output = pipeline.denoise(params, inputs, jnp.full(len(inputs), timesteps[i]), conditioning)
        if guided:
            uncond, cond = jnp.split(output, 2)
            output = uncond + guidance_scale * (cond - uncond)
        fresh = rollout.normal(keys, i, latents.shape[1:]) if scheduler.needs_noise else None
        return scheduler.step(output, latents, i, state, fresh)

    start = (latents, scheduler.init_state(latents))
    latents, _ = lax.fori_loop(first, len(timesteps), body, start)
    return latents


def program(
    pipeline: Pipeline, scheduler: Scheduler, guided: bool, blocks: repeat.Repeat = repeat.PLAIN
) -> Callable[..., Float[Array, "b h w 3"]]:
    """Return (params, tokens, noise, keys, guidance_scale) -> images in [0, 1], to be jitted.

    The network is called without the prompt too where it is `guided`; otherwise guidance_scale has
    no effect. `blocks` says how the networks' blocks compile.
    """
    empty = jax.tree.map(jnp.asarray, pipeline.empty) if guided else {}

    def run(
        params: dict[str, Params], tokens, noise, keys, guidance_scale
    ) -> Float[Array, "b h w 3"]:
        with repeat.use(blocks):
            conditioning = pipeline.encode_prompt(params, tokens)
            negative = pipeline.encode_negative(params, empty, conditioning) if guided else None
            latents = sample_latents(
                pipeline,
                scheduler,
                params[pipeline.generator_part],
                noise * scheduler.init_noise_sigma,
                conditioning,
                negative,
                guidance_scale,
                keys,
            )
            return pipeline.decode(params["vae"], latents)

    return run


class ImageSampler:
    """Draws images of prompts with one pipeline, scheduler and guidance; compiled once.

    With a `mesh`, the parameters live on it. A batch that its data and fsdp axes divide is split
    over them, and every process gets all images. `blocks` says how the networks' blocks compile.

    Attributes:
      guided: whether the network is called with and without the prompt.
      network_calls: an image.
      run: the jitted program, which a call runs.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: Scheduler,
        guidance_scale: float,
        mesh: Mesh | None = None,
        blocks: repeat.Repeat = repeat.PLAIN,
    ):
        self.guided = guidance_scale > 1
        self.network_calls = len(scheduler.timesteps) * (2 if self.guided else 1)

        draw = program(pipeline, scheduler, self.guided, blocks)

        def run(params: dict[str, Params], tokens, noise, keys) -> Float[Array, "b h w 3"]:
            return draw(params, tokens, noise, keys, guidance_scale)

        self.run = sharding.spread(run, mesh) if mesh else jax.jit(run)

    def __call__(
        self, params: dict[str, Params], tokens: Tokens, noise: Any, keys: Any
    ) -> Float[Array, "b h w 3"]:
        """Return images in [0, 1] of B prompts' tokens and standard normal noise [B, h, w, c]."""
        return self.run(params, tokens, noise, keys)
