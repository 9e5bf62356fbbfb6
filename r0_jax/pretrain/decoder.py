"""Stage `decoder`: trains the VAE's decoder on the latents that the UNet predicts.

Denoised latents of a small network differ from the encoder's, always in the same ways. They are
too smooth, and few steps dent the outlines. The latent space stays the same, so the UNet needs no
new training.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from r0_jax.pipelines import stable_diffusion
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.vae import STEM, difference, scene_batches
from r0_jax.shapes.captions import captions_for
from r0_jax.shapes.scene import render
from r0_jax.weights import convert, lazy


def train(config: ConfigDict, out: Path) -> None:
    """Train the decoder in `out/pipeline/vae`; keep the encoder."""
    pipeline = stable_diffusion.load(out / "pipeline")
    vae, frozen = pipeline.networks["vae"], lazy.place(pipeline.params)
    scale = vae.config.scaling_factor
    products = pipeline.scheduler_config.noise.alphas_cumprod[: config.latest_timestep]
    alphas, sigmas = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (products, 1 - products))

    def loss(params, batch, key):
        images = 2 * render(batch["scenes"], batch["layouts"], xp=jnp) - 1
        mean, _ = vae.apply(frozen["vae"], "encode", images)
        latents = predict(scale * mean, batch["input_ids"], key)
        decoded = vae.apply({**frozen["vae"], **params}, "decode", latents / scale)
        value, psnr = difference(decoded, images, config.outline_weight)
        return value, {"psnr": psnr}

    def predict(latents, input_ids, key):
        """Noise latents and denoise them in two steps, at t and t / 2; keep a share clean."""
        t_key, noise_key, clean_key = jax.random.split(key, 3)
        count = len(latents)
        t = jax.random.randint(t_key, (count,), 0, len(alphas))
        conditioning = pipeline.encode_prompt(frozen, {"input_ids": input_ids})
        x0, epsilon = latents, jax.random.normal(noise_key, latents.shape)
        for now in (t, t // 2):
            alpha, sigma = (x[now][:, None, None, None] for x in (alphas, sigmas))
            noisy = alpha * x0 + sigma * epsilon
            velocity = pipeline.denoise(
                frozen["unet"], noisy, now.astype(jnp.float32), conditioning
            )
            x0, epsilon = alpha * noisy - sigma * velocity, alpha * velocity + sigma * noisy
        clean = jax.random.bernoulli(clean_key, config.clean_share, (count, 1, 1, 1))
        return jnp.where(clean, latents, x0)

    def batches():
        rng = np.random.default_rng(config.seed)
        for scenes, layouts in scene_batches(config.seed, config.batch_size):
            yield {
                "scenes": scenes,
                "layouts": layouts,
                **pipeline.tokenize(captions_for(scenes, rng)),
            }

    start = {
        name: np.asarray(value)
        for name, value in pipeline.params["vae"].items()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    params = {**pipeline.params["vae"], **fit(loss, start, batches(), config)}
    path = out / "pipeline" / "vae" / f"{STEM}.safetensors"
    convert.save(params, path, config.store_dtype)
    console.print(f"written to {path}")
