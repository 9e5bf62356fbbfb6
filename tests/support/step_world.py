"""The smallest world in which a training step can be taken: toy networks that compile at once.

    world = step_world.make({"sampler.num_steps": 2, "regularizers.output.weight": 0.5})
    (loss, metrics), grads = world.value_and_grad(world.params(), world.batch(4), last=1)

The toys offer what the objective uses of the real networks, under the real names, so that LoRA,
sharding rules and penalties meet what they will meet in earnest.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from r0_jax import config as base
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.method import optim, train_state
from r0_jax.method.generator import Generator
from r0_jax.method.objective import Objective
from r0_jax.method.reward_step import Drawn
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.models.clip import CLIPTextConfig, CLIPTextModel
from r0_jax.models.linear import Conv, Linear
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.parallel import sharding
from r0_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from r0_jax.rewards.reward import Reward
from r0_jax.training.program import sharding_of_state, step_on
from r0_jax.weights.network import Network, Params

TOKENS, WORDS, EMBED = 6, 50, 8
SCHEDULER = {  # of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}


class ToyConfig(NamedTuple):
    sample_size: int = 4
    in_channels: int = 4
    width: int = 8
    depth: int = 1
    block_out_channels: tuple[int, ...] = (8, 8)  # two levels: images are twice the latents
    scaling_factor: float = 0.5
    shift_factor: float | None = None


class ToyAttention(nnx.Module):
    """Not attention, but a layer of its name."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.to_q = Linear(width, width, use_bias=False, rngs=rngs)
        self.to_k = Linear(EMBED, width, use_bias=False, rngs=rngs)

    def __call__(self, hidden, prompt_embeds):
        gate = jnp.tanh(self.to_k(prompt_embeds).mean(axis=1))[:, None, None]
        return hidden + self.to_q(hidden) * gate


class ToyBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.attn2 = ToyAttention(width, rngs=rngs)
        self.conv = Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, hidden, prompt_embeds):
        return hidden + self.conv(jax.nn.silu(self.attn2(hidden, prompt_embeds)))


class ToyUNet(nnx.Module):
    def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conv_in = Conv(config.in_channels, config.width, (3, 3), rngs=rngs)
        self.time_embedding = Linear(2, config.width, rngs=rngs)
        self.blocks = nnx.List([ToyBlock(config.width, rngs=rngs) for _ in range(config.depth)])
        self.conv_out = Conv(config.width, config.in_channels, (3, 3), rngs=rngs)

    def mid_features(self, latents, timesteps, prompt_embeds):
        angle = timesteps.astype(latents.dtype)[:, None] / 1000
        time = self.time_embedding(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1))
        hidden = self.conv_in(latents) + time[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, prompt_embeds)
        return hidden

    def __call__(self, latents, timesteps, prompt_embeds):
        return self.conv_out(jax.nn.silu(self.mid_features(latents, timesteps, prompt_embeds)))


class ToyDecoder(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv_in = Conv(channels, 12, (3, 3), rngs=rngs)


class ToyVAE(nnx.Module):
    """Images strictly inside of [-1, 1], so that no pixel is ever clipped."""

    def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.decoder = ToyDecoder(config.in_channels, rngs=rngs)

    def decode(self, latents):
        b, h, w, _ = latents.shape
        pixels = jnp.tanh(0.3 * self.decoder.conv_in(latents)).reshape(b, h, w, 2, 2, 3)
        return jnp.moveaxis(pixels, 3, 2).reshape(b, 2 * h, 2 * w, 3)


class ToyText(NamedTuple):
    last_hidden_state: jax.Array


class ToyTextEncoder(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.config = {}
        self.token_embedding = nnx.Embed(WORDS, EMBED, rngs=rngs)

    def __call__(self, input_ids):
        return ToyText(jnp.sin(3 * self.token_embedding(input_ids)))


def toy_networks(config: ToyConfig) -> dict[str, Network]:
    return {
        "unet": Network.abstract(lambda rngs: ToyUNet(config, rngs=rngs)),
        "vae": Network.abstract(lambda rngs: ToyVAE(config, rngs=rngs)),
        "text_encoder": Network.abstract(lambda rngs: ToyTextEncoder(rngs=rngs)),
    }


def real_networks(width: int = 4) -> dict[str, Network]:
    """The project's own networks, at their smallest."""
    unet = UNet2DConditionConfig.from_json(
        {
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [width],
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["UpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "attention_head_dim": 2,
            "cross_attention_dim": EMBED,
        }
    )
    vae = AutoencoderKLConfig.from_json(
        {
            "sample_size": 4,
            "block_out_channels": [width],
            "latent_channels": 4,
            "norm_num_groups": 2,
            "down_block_types": ["DownEncoderBlock2D"],
            "layers_per_block": 1,
            "up_block_types": ["UpDecoderBlock2D"],
            "scaling_factor": 0.5,
        }
    )
    text = CLIPTextConfig.from_json(
        {
            "hidden_size": EMBED,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": WORDS,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS,
            "projection_dim": 4,
            "eos_token_id": WORDS - 1,
            "bos_token_id": 0,
            "hidden_act": "quick_gelu",
        }
    )
    return {
        "unet": Network.abstract(lambda rngs: UNet2DConditionModel(unet, rngs=rngs)),
        "vae": Network.abstract(lambda rngs: AutoencoderKL(vae, rngs=rngs)),
        "text_encoder": Network.abstract(lambda rngs: CLIPTextModel(text, rngs=rngs)),
    }


def random_params(network: Network, seed: int) -> Params:
    """Every parameter random, whatever it would start at; the same on any machine."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in network.shapes.items():
        value = rng.standard_normal(shape.shape).astype(np.float32)
        fan_in = np.prod(shape.shape[:-1])
        scale = 1 / np.sqrt(fan_in) if name.endswith("kernel") else 0.3
        params[name] = name.endswith("scale") + np.float32(scale) * value
    return params


def brightness(params: Params, images: jax.Array, features: None) -> jax.Array:
    """A reward that does not read the prompt."""
    del features
    return -jnp.mean((images - params["target"][None, None, None]) ** 2, axis=(1, 2, 3))


def agreement(params: Params, images: jax.Array, features: jax.Array) -> jax.Array:
    """A reward of CLIP form: 300 times larger than `brightness`, so that normalization shows."""
    projected = jnp.einsum("bhwc,cd->bd", jnp.sin(5 * images), params["projection"])
    projected = projected / jnp.linalg.norm(projected, axis=-1, keepdims=True)
    return 300 * jnp.sum(projected * features, axis=-1)


REWARDS = [
    Reward("brightness", {"target": np.asarray([0.9, 0.2, 0.4], np.float32)}, brightness, None),
    Reward(
        "agreement",
        {"projection": np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)},
        agreement,
        lambda params, prompts: np.ones((len(prompts), 5), np.float32),
    ),
]


def config(changes: dict[str, Any] | None = None) -> ConfigDict:
    """The base config in this world, with changes by dotted name."""
    config = base.get_config()
    with config.unlocked():
        config.rewards.brightness = base.reward_entry("function", weight=0.7)
        config.rewards.agreement = base.reward_entry("function", weight=1.3)
    # An eps that dwarfs the gradient makes Adam's first update the gradient itself, so that a
    # wrong gradient is a wrong result.
    config.update_from_flattened_dict(
        {
            "lora.rank": 2,
            "lora.alpha": 3.0,
            "lora.targets": r".*(to_q|to_k|conv|conv_out)",
            "objective.bound": 0.0,  # so that a gradient is that of plain autodiff
            "optimizer.warmup_steps": 0,
            "optimizer.eps": 100.0,
            "optimizer.learning_rate": 100.0,
            "batch_size": 8,
            "steps": 10,
            **(changes or {}),
        }
    )
    return config


class World(NamedTuple):
    config: ConfigDict
    pipeline: StableDiffusionPipeline
    generator: Generator
    objective: Objective
    frozen: dict[str, Any]

    def params(self, noise: float = 0.1) -> Params:
        """Trainable parameters somewhat away from where training starts (LoRA's B is 0 there)."""
        params = self.generator.init(
            jax.random.key(3), self.frozen["base"], self.pipeline.networks["unet"].shapes
        )
        rng = np.random.default_rng(5)
        return {
            name: value + noise * rng.standard_normal(value.shape).astype(np.float32)
            for name, value in params.items()
        }

    def value_and_grad(self, params, batch, last, keys=None):
        """((loss, metrics), grads), compiled."""
        keys = sample_keys(len(batch["input_ids"])) if keys is None else keys
        return self.program()(params, self.frozen, batch, keys, Drawn(last), {})

    def program(self):
        return _program(self.objective)

    def step(self, mesh=None):
        """(state, batch, key) -> (state, metrics) on a mesh, compiled; and the state to start
        from. Without a mesh, on one device."""
        mesh = mesh or sharding.make_mesh({"data": 1}, jax.devices()[:1])
        optimizer = optim.make_optimizer(self.config, self.config.regularizers.langevin.weight)
        spread_of = (
            list(self.frozen["rewards"])
            if self.config.objective.normalization == "running_std"
            else []
        )
        fake = self.objective.fake
        shapes = self.pipeline.networks["unet"].shapes
        started = fake.init(jax.random.key(4), self.frozen["base"], shapes) if fake else ()
        state = train_state.init(self.params(), optimizer, spread_of, started)
        shapes = jax.eval_shape(lambda: state)
        specs = sharding_of_state(shapes, mesh, self.config.sharding)
        step = jax.jit(
            step_on(mesh, self.objective, optimizer, self.config),
            out_shardings=(specs, sharding.replicated(mesh)),
        )
        frozen = place(self.frozen, mesh, self.config)
        split = sharding.batch_sharding(mesh)

        def run(state, batch, key=jax.random.key(7)):  # noqa: B008
            return step(state, frozen, sharding.put_batch(batch, split), key)

        return run, jax.device_put(state, specs), optimizer


@functools.cache
def _program(objective: Objective):
    return jax.jit(jax.value_and_grad(objective.loss, has_aux=True))


def make(
    changes: dict[str, Any] | None = None,
    toy: ToyConfig | None = ToyConfig(),  # noqa: B008
    prediction_type: str = "epsilon",
    rewards: list[Reward] | None = None,
    width: int = 4,
    scheduler: dict[str, Any] = SCHEDULER,
) -> World:
    """A world of toy networks; of the real ones, `width` channels wide, if `toy` is None."""
    settings = config(changes)
    networks = real_networks(width) if toy is None else toy_networks(toy)
    params = {
        part: random_params(network, seed) for seed, (part, network) in enumerate(networks.items())
    }
    rewards = REWARDS if rewards is None else rewards
    pipeline = StableDiffusionPipeline(
        Path("."),
        networks,
        params,
        {"tokenizer": CLIPTokenizer()},
        SchedulerConfig.from_json(scheduler | {"prediction_type": prediction_type}),
    )
    lora = settings.lora
    generator = Generator(lora.rank, lora.alpha, lora.targets, settings.dtype)
    frozen = {
        "base": params["unet"],
        "vae": params["vae"],
        "text_encoder": params["text_encoder"],
        "rewards": {reward.name: reward.params for reward in rewards},
        "empty": {"input_ids": np.full((1, TOKENS), WORDS - 1, np.int32)},
    }
    frozen = jax.tree.map(jnp.asarray, frozen)
    objective = Objective(pipeline, generator, rewards, settings)
    if objective.fake:  # as in a later step
        shapes = pipeline.networks["unet"].shapes
        adapters = objective.fake.network.init(jax.random.key(6), frozen["base"], shapes)
        frozen["fake"] = {name: 0.1 + value for name, value in adapters.items()}
    return World(settings, pipeline, generator, objective, frozen)


def place(frozen: dict[str, Any], mesh, config: ConfigDict) -> dict[str, Any]:
    def put(params: Params) -> Params:
        shapes = jax.eval_shape(lambda: params)
        return jax.device_put(params, sharding.param_sharding(shapes, mesh, config.sharding))

    networks = {part: put(frozen[part]) for part in ("base", "vae", "text_encoder")}
    return {
        **networks,
        "rewards": {k: put(v) for k, v in frozen["rewards"].items()},
        "empty": jax.device_put(frozen["empty"], sharding.replicated(mesh)),
    }


def batch(size: int) -> dict[str, np.ndarray]:
    """Row i is the same in a batch of any size."""
    rng = np.random.default_rng(11)
    ids = rng.integers(0, WORDS - 1, (64, TOKENS)).astype(np.int32)
    features = rng.standard_normal((64, 5)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return {"input_ids": ids[:size], "features/agreement": features[:size]}


def sample_keys(size: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(size))


def assert_close(found, expected, rtol: float = 1e-5) -> None:
    """Trees that agree, each leaf relative to its own largest entry, cosines relative to 1."""
    found, expected = jax.device_get((found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in leaves:
        a, b = np.asarray(a), np.asarray(b)
        worst = np.max(np.abs(a - b), initial=0)
        least = 1.0 if "'cosine/" in jax.tree_util.keystr(path) else 1e-12
        assert worst <= rtol * max(np.max(np.abs(b), initial=0), least), (
            f"{jax.tree_util.keystr(path)}: off by {worst:.3g}, entries up to "
            f"{np.max(np.abs(b)):.3g}"
        )
