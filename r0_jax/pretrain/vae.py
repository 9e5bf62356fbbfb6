"""Stage `vae`: trains the autoencoder on rendered scenes."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.pretrain.degrade import blur
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.folders import write_json
from r0_jax.shapes.scene import Layout, Scene, render, sample_layouts, sample_scenes
from r0_jax.weights import convert
from r0_jax.weights.network import Network, init

CHUNK = 128  # images encoded or decoded at once
STEM = "diffusion_pytorch_model"


def scene_batches(
    seed: int, batch_size: int, split: str = "train"
) -> Iterator[tuple[Scene, Layout]]:
    """Yield random scenes and layouts without end, drawn on the host."""
    rng = np.random.default_rng(seed)
    while True:
        scenes = sample_scenes(rng, batch_size, split)
        yield scenes, sample_layouts(rng, scenes)


def difference(
    decoded: Float[Array, "b h w 3"], images: Float[Array, "b h w 3"], outline_weight: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return a loss of images in [-1, 1], absolute plus squared error, and the PSNR in dB.

    Outlines count `outline_weight` times: they define the shapes, but most pixels are background.
    """
    error = decoded - images
    soft = blur(images, jnp.full(len(images), 1.0))
    outline = jnp.max(jnp.abs(images - soft), axis=-1, keepdims=True) > 0.03
    weighted = jnp.where(outline, outline_weight, 1.0) * (jnp.abs(error) + error**2)
    return jnp.mean(weighted), -10 * jnp.log10(jnp.mean(error**2) / 4)


def train(config: ConfigDict, out: Path) -> None:
    """Train the VAE on reconstruction and a KL term; write `out/pipeline/vae`."""
    fields = config.network.to_dict()
    parsed = AutoencoderKLConfig.from_json(fields)

    def constructor(rngs):
        return AutoencoderKL(parsed, rngs=rngs)

    network = Network.abstract(constructor)

    def loss(params, batch, key):
        images = 2 * render(*batch, xp=jnp) - 1
        mean, log_variance = network.apply(params, "encode", images)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        value, psnr = difference(
            network.apply(params, "decode", latents), images, config.outline_weight
        )
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return value + config.kl_weight * kl, {"psnr": psnr, "kl": kl}

    folder = out / "pipeline" / "vae"
    if config.warm_start:
        start = convert.load(convert.find_files(folder, STEM), network)
    else:
        start = init(constructor, jax.random.key(config.seed))
    params = fit(loss, start, scene_batches(config.seed, config.batch_size), config)

    # Stable Diffusion scales latents to unit standard deviation.
    encode = jax.jit(
        lambda params, batch: network.apply(params, "encode", 2 * render(*batch, xp=jnp) - 1)[0]
    )
    latents = encode(params, next(scene_batches(config.seed + 10_000, 8 * CHUNK)))
    fields["scaling_factor"] = round(1 / float(jnp.std(latents)), 5)
    convert.save(params, folder / f"{STEM}.safetensors", config.store_dtype)
    write_json(folder / "config.json", fields)
    console.print(
        f"scaling_factor {fields['scaling_factor']}, channel std "
        f"{np.std(np.asarray(latents), (0, 1, 2)).round(3)}, written to {folder}"
    )
