"""Stage `unet`: trains the UNet on cached latents; VAE and text encoder are frozen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from r0_jax.diffusion import schedulers
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.evaluation.batches import draw
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.files import read_json
from r0_jax.pipelines.folder import NETWORKS
from r0_jax.pipelines.stable_diffusion import PARTS, StableDiffusionPipeline
from r0_jax.pipelines.tokenizers import load_tokenizer
from r0_jax.pretrain.fit import console, fit
from r0_jax.pretrain.folders import write_json
from r0_jax.pretrain.vae import CHUNK, scene_batches
from r0_jax.shapes.captions import captions_for, prompts
from r0_jax.shapes.judge import judge
from r0_jax.shapes.scene import render
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, init

CAPTIONS = 6  # per scene, drawn once


def train(config: ConfigDict, out: Path) -> None:
    """Train the UNet; write unet, scheduler and model_index.json to `out/pipeline`."""
    folder = out / "pipeline"
    tokenizer = load_tokenizer(folder / "tokenizer")
    fields = config.network.to_dict()
    scheduler_config = SchedulerConfig.from_json(config.scheduler.to_dict())
    networks, frozen = {}, {}
    for part in ("vae", "text_encoder"):
        part_fields = read_json(folder / part / "config.json")
        networks[part] = Network.abstract(_constructor(part, part_fields))
        frozen[part] = jax.device_put(
            convert.load(convert.find_files(folder / part, _stem(part)), networks[part])
        )
    networks["unet"] = unet = Network.abstract(_constructor("unet", fields))
    if config.warm_start:
        start = convert.load(convert.find_files(folder / "unet", _stem("unet")), unet)
    else:
        start = init(_constructor("unet", fields), jax.random.key(config.seed))

    pipeline = StableDiffusionPipeline(
        folder, networks, frozen, {"tokenizer": tokenizer}, scheduler_config
    )
    products = scheduler_config.noise.alphas_cumprod
    alphas, sigmas = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (products, 1 - products))
    empty = jnp.asarray(pipeline.tokenize([""])["input_ids"])

    def loss(params, batch, key):
        """Return the mean squared error of v = alpha eps - sigma x0 at uniform timesteps."""
        latents, input_ids = batch["latents"], batch["input_ids"]
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        count = len(latents)
        # Stratified: each batch covers all noise levels evenly.
        t = (jnp.arange(count) + jax.random.uniform(t_key, (count,))) / count * len(alphas)
        t = t.astype(jnp.int32)
        noise = jax.random.normal(noise_key, latents.shape)
        alpha, sigma = (x[t][:, None, None, None] for x in (alphas, sigmas))
        dropped = jax.random.bernoulli(drop_key, config.prompt_dropout, (count, 1))
        tokens = {"input_ids": jnp.where(dropped, empty, input_ids)}
        conditioning = pipeline.encode_prompt(frozen, tokens)
        velocity = pipeline.denoise(
            params, alpha * latents + sigma * noise, t.astype(jnp.float32), conditioning
        )
        return jnp.mean((velocity - (alpha * noise - sigma * latents)) ** 2), {}

    images = ImageSampler(
        pipeline, schedulers.from_config(scheduler_config, 25), config.guidance_scale
    )

    def on_evaluate(step: int, params: Params) -> None:
        write(params)
        captions = prompts("validation", config.eval_prompts, seed=1)
        noise, keys = fixed_noise(0, len(captions), pipeline.latent_shape)
        drawn = draw(
            images,
            {**frozen, "unet": params},
            pipeline.tokenize(captions),
            noise,
            keys,
            len(captions),
        )
        shares = {name: np.mean(v) for name, v in judge(drawn, captions)._asdict().items()}
        console.print(
            f"judge at step {step}: " + " ".join(f"{k} {v:.3f}" for k, v in shares.items()),
            highlight=False,
        )

    def write(params: Params) -> None:
        convert.save(params, folder / "unet" / f"{_stem('unet')}.safetensors", config.store_dtype)
        write_json(folder / "unet" / "config.json", fields)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config.fields)
        write_json(folder / "model_index.json", config.model_index.to_dict())

    data = latents_and_captions(config, pipeline)
    write(fit(loss, start, batches(data, config), config, on_evaluate))


def _constructor(part: str, fields: dict[str, Any]):
    build, _ = NETWORKS[PARTS[part][0]]
    return lambda rngs: build(fields, rngs)


def _stem(part: str) -> str:
    return NETWORKS[PARTS[part][0]][1]


def latents_and_captions(
    config: ConfigDict, pipeline: StableDiffusionPipeline
) -> dict[str, np.ndarray]:
    """Return scaled latents [N, h, w, c] of training scenes, and token ids [N, CAPTIONS, T]."""
    network = pipeline.networks["vae"]

    @jax.jit
    def encode(params, batch):
        mean, _ = network.apply(params, "encode", 2 * render(*batch, xp=jnp) - 1)
        return mean * network.config.scaling_factor

    rng = np.random.default_rng(config.seed + 1)
    latents, input_ids = [], []
    stream = scene_batches(config.seed, CHUNK)
    for _ in range(config.scenes // CHUNK):
        scenes, layouts = next(stream)
        latents.append(np.asarray(encode(pipeline.params["vae"], (scenes, layouts))))
        ids = [pipeline.tokenize(captions_for(scenes, rng))["input_ids"] for _ in range(CAPTIONS)]
        input_ids.append(np.stack(ids, axis=1).astype(np.int16))
    console.print(f"encoded {len(latents) * CHUNK} scenes")
    return {"latents": np.concatenate(latents), "input_ids": np.concatenate(input_ids)}


def batches(data: dict[str, np.ndarray], config: ConfigDict) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of random scenes, each with one of its captions."""
    rng = np.random.default_rng(config.seed + 2)
    while True:
        rows = rng.integers(len(data["latents"]), size=config.batch_size)
        which = rng.integers(CAPTIONS, size=config.batch_size)
        yield {
            "latents": data["latents"][rows],
            "input_ids": data["input_ids"][rows, which].astype(np.int32),
        }
