"""Stage `unet`: the denoising network and its text encoder, trained together on cached latents."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from r0_jax import convert, schedulers
from r0_jax.inference import ImageSampler
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.models.config import read_json
from r0_jax.network import Network, Params, init
from r0_jax.pipelines.stable_diffusion import (
    PARTS,
    StableDiffusionPipeline,
    load_tokenizer,
    tokenize,
)
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.folders import write_json
from r0_jax.pretrain.vae import CHUNK, scene_batches
from r0_jax.shapes.captions import captions_for, prompts
from r0_jax.shapes.judge import judge
from r0_jax.shapes.scene import render

CAPTIONS = 6  # of each scene, drawn once


def train(config: ConfigDict, out: Path) -> None:
    """Writes `out/pipeline` (unet, text_encoder, scheduler, model_index.json)."""
    folder = out / "pipeline"
    tokenizer = load_tokenizer(folder / "tokenizer")
    length = config.text_encoder.max_position_embeddings
    fields = {"unet": config.unet.to_dict(),
              "text_encoder": {**config.text_encoder.to_dict(), "vocab_size": len(tokenizer),
                               "bos_token_id": tokenizer.bos_token_id,
                               "eos_token_id": tokenizer.eos_token_id,
                               "pad_token_id": tokenizer.pad_token_id}}
    vae, vae_params = _vae(folder / "vae")
    networks, params = {"vae": vae}, {}
    for part, key in zip(fields, jax.random.split(jax.random.key(config.seed)), strict=True):
        def constructor(rngs, part=part):
            return PARTS[part][1](fields[part], rngs)
        networks[part] = Network.abstract(constructor)
        if config.warm_start:
            values = convert.load(convert.find_files(folder / part, PARTS[part][2]), networks[part])
        else:
            values = init(constructor, key)
        params |= {f"{part}/{name}": value for name, value in values.items()}

    scheduler_config = config.scheduler.to_dict()
    pipeline = StableDiffusionPipeline(folder, networks, {"vae": vae_params}, tokenizer,
                                       scheduler_config)
    products = schedulers.alphas_cumprod(scheduler_config)
    alphas, sigmas = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (products, 1 - products))
    empty = jnp.asarray(tokenize(tokenizer, [""], length))

    def loss(params, batch, key):
        """Mean squared error of the velocity v = alpha eps - sigma x0 at uniform timesteps."""
        latents, input_ids = batch["latents"], batch["input_ids"]
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        count = len(latents)
        # Stratified: the loss of one batch sees all noise levels alike.
        t = (jnp.arange(count) + jax.random.uniform(t_key, (count,))) / count * len(alphas)
        t = t.astype(jnp.int32)
        noise = jax.random.normal(noise_key, latents.shape)
        alpha, sigma = (x[t][:, None, None, None] for x in (alphas, sigmas))
        dropped = jax.random.bernoulli(drop_key, config.prompt_dropout, (count, 1))
        parts = split_parts(params)
        conditioning = pipeline.encode_prompt(parts, jnp.where(dropped, empty, input_ids))
        velocity = pipeline.denoise(parts["unet"], alpha * latents + sigma * noise,
                                    t.astype(jnp.float32), conditioning)
        return jnp.mean((velocity - (alpha * noise - sigma * latents)) ** 2), {}

    images = ImageSampler(pipeline, schedulers.from_config(scheduler_config, 25),
                          config.guidance_scale)

    def on_evaluate(step: int, params: Params) -> None:
        write(params)
        captions = prompts("validation", config.eval_prompts, seed=1)
        noise = np.random.default_rng(0).standard_normal(
            (len(captions), *pipeline.latent_shape), np.float32)
        keys = jax.random.split(jax.random.key(0), len(captions))
        parts = {**split_parts(params), "vae": vae_params}
        verdict = judge(np.asarray(images(parts, pipeline.tokenize(captions), noise, keys)),
                        captions)
        shares = {name: float(np.mean(v)) for name, v in verdict._asdict().items()}
        console.print(f"judge at step {step}: "
                      + " ".join(f"{k} {v:.3f}" for k, v in shares.items()), highlight=False)

    def write(params: Params) -> None:
        for part, values in split_parts(params).items():
            convert.save(values, folder / part / f"{PARTS[part][2]}.safetensors",
                         config.store_dtype)
            write_json(folder / part / "config.json", fields[part])
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
        write_json(folder / "model_index.json", config.model_index.to_dict())

    data = latents_and_captions(config, pipeline, vae_params, length)
    write(fit(loss, params, batches(data, config), config, on_evaluate))


def split_parts(params: Params) -> dict[str, Params]:
    """{"unet/conv_in.kernel": ...} -> {"unet": {"conv_in.kernel": ...}, ...}."""
    parts: dict[str, Params] = {}
    for name, value in params.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    return parts


def _vae(folder: Path) -> tuple[Network, Params]:
    parsed = AutoencoderKLConfig.from_json(read_json(folder / "config.json"))
    network = Network.abstract(lambda rngs: AutoencoderKL(parsed, rngs=rngs))
    return network, convert.load(convert.find_files(folder, PARTS["vae"][2]), network)


def latents_and_captions(config: ConfigDict, pipeline: StableDiffusionPipeline, vae_params: Params,
                         length: int) -> dict[str, np.ndarray]:
    """Scaled latents [N, h, w, c] of training scenes and token ids [N, CAPTIONS, T] of each."""
    network = pipeline.networks["vae"]

    @jax.jit
    def encode(params, batch):
        mean, _ = network.apply(params, "encode", 2 * render(*batch, xp=jnp) - 1)
        return mean * network.config.scaling_factor

    rng = np.random.default_rng(config.seed + 1)
    vae_params = jax.device_put(vae_params)
    latents, input_ids = [], []
    stream = scene_batches(config.seed, CHUNK)
    for _ in range(config.scenes // CHUNK):
        scenes, layouts = next(stream)
        latents.append(np.asarray(encode(vae_params, (scenes, layouts))))
        ids = [tokenize(pipeline.tokenizer, captions_for(scenes, rng), length)
               for _ in range(CAPTIONS)]
        input_ids.append(np.stack(ids, axis=1).astype(np.int16))
    console.print(f"encoded {len(latents) * CHUNK} scenes")
    return {"latents": np.concatenate(latents), "input_ids": np.concatenate(input_ids)}


def batches(data: dict[str, np.ndarray], config: ConfigDict) -> Iterator[dict[str, np.ndarray]]:
    """Random scenes, each with a random one of its captions."""
    rng = np.random.default_rng(config.seed + 2)
    while True:
        rows = rng.integers(len(data["latents"]), size=config.batch_size)
        which = rng.integers(CAPTIONS, size=config.batch_size)
        yield {"latents": data["latents"][rows],
               "input_ids": data["input_ids"][rows, which].astype(np.int32)}
