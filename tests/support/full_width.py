"""Every network at its published width and depth, against PyTorch, one after the other.

    python tests/support/full_width.py clip_l_text t5_xxl  # without names: all missing

Each case is two processes, so that never both copies of the weights are in memory: PyTorch's draws
its weights tensor by tensor from seeds, leaves outputs and gradients in a file and ends; JAX's
draws the same weights and compares. What was measured goes to runs/parity/CASE.json and is taken
from there until the code or a version changes; `make parity` makes the table of it.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from published import config_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "runs" / "parity"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
MOST_MEMORY = 24  # GiB of one process
OUTPUT, GRADIENT = 1e-4, 1e-3  # largest difference as a share of the largest element


class Case(NamedTuple):
    """A network on both sides. Everything is made when it is called for, on its own side.

    Attributes:
      reference: whose module PyTorch's is.
      module: makes PyTorch's, on the meta device.
      network: makes ours.
      inputs: images and other arrays as [B, H, W, C]; gradients are with respect to the floats.
      theirs, ours: (module, *inputs), (network, params, *inputs) -> outputs.
      keeps: what parameters of a reward stay float32 when its tower is bfloat16; None for what is
        no reward.
      gradient: the error that is allowed of gradients.
    """

    reference: str
    module: Callable[[], Any]
    network: Callable[[], Any]
    inputs: Callable[[], tuple[np.ndarray, ...]]
    theirs: Callable
    ours: Callable
    keeps: tuple[str, ...] | None = None
    gradient: float = GRADIENT  # allowed


# --- what both sides share ------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def token_ids(length: int, words: int, ends: bool) -> np.ndarray:
    """One prompt of 20 tokens, padded with 0; `ends` with the highest id, as CLIP's do."""
    ids = np.random.default_rng(0).integers(1000, words - 2, (1, length)).astype(np.int32)
    ids[0, 20:] = 0
    if ends:
        ids[0, 19] = words - 1
    return ids


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of one tensor in the layout of its file; the same in every process."""
    for prefix in ("text_model.", "model."):  # of which transformers keeps the file's name, or not
        key = key.removeprefix(prefix)
    if not shape:
        return np.asarray(2.6592, np.float32)  # the logit scale
    value = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, np.float32)
    if len(shape) == 1:
        value *= 0.1
        if key.endswith("weight"):  # the scale of a norm
            value += 1
    else:
        value /= np.sqrt(np.prod(shape[1:]))
        if key.endswith("SelfAttention.q.weight"):
            value /= 8  # T5 trains without the scale of its scores
    return value


def _network(path: str, config: str, fields: Callable[[], dict]) -> Callable[[], Any]:
    """Makes the Network of a class and config class of `r0_jax.models`, by name."""

    def make():
        from r0_jax.weights.network import Network

        module_name, kind = path.split(".")
        module = importlib.import_module(f"r0_jax.models.{module_name}")
        parsed = getattr(module, config).from_json(fields())
        return Network.abstract(lambda rngs: getattr(module, kind)(parsed, rngs=rngs))

    return make


def _transformers(kind: str, fields: Callable[[], dict]) -> Callable[[], Any]:
    def make():
        import transformers

        kind_of_config = kind.replace("EncoderModel", "").replace("WithProjection", "")
        config = getattr(transformers, kind_of_config.removesuffix("Model") + "Config")
        return getattr(transformers, kind)(config(**fields()))

    return make


def _diffusers(kind: str, fields: Callable[[], dict]) -> Callable[[], Any]:
    def make():
        import diffusers

        return getattr(diffusers, kind).from_config(fields())

    return make


def _twin(kind: str, *fields: Callable[[], dict]) -> Callable[[], Any]:
    def make():
        import torch_twins

        return getattr(torch_twins, kind)(*(f() for f in fields))

    return make


def _architecture(module: str, name: str) -> Callable[[], dict]:
    def fields():
        return importlib.import_module(f"r0_jax.models.{module}").ARCHITECTURES[name]

    return fields


# --- rewards --------------------------------------------------------------------------------------


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def _cosine_there(module, ids, images):
    if hasattr(module, "image_features"):
        image, text = module.image_features(images), module.text_features(ids)
    else:
        image = module.get_image_features(images).pooler_output
        text = module.get_text_features(ids).pooler_output
    return (_unit(image) * _unit(text)).sum(-1)


def _cosine_here(network, params, ids, images):
    import jax.numpy as jnp

    from r0_jax.rewards.tower import normalize

    image = network.apply(params, "image_features", images.astype(params["logit_scale"].dtype))
    text = network.apply(params, "text_features", jnp.asarray(ids))
    return jnp.sum(normalize(image) * normalize(text), axis=-1)


def _cosine(reference: str, module, network, length: int, words: int, ends: bool) -> Case:
    return Case(
        reference,
        module,
        network,
        lambda: (token_ids(length, words, ends), normal(0, 1, 224, 224, 3)),
        _cosine_there,
        _cosine_here,
        ("logit_scale.",),
    )


def _open_clip(name: str) -> Case:
    fields = _architecture("open_clip", name)
    return _cosine(
        "torch twin",
        _twin("OpenCLIP", fields),
        _network("open_clip.OpenCLIP", "OpenCLIPConfig", fields),
        77,
        49408,
        True,
    )


def _clip(name: str) -> Case:
    def fields():
        return config_of(name)

    return _cosine(
        "transformers",
        _transformers("CLIPModel", fields),
        _network("clip.CLIPModel", "CLIPConfig", fields),
        77,
        49408,
        True,
    )


def _cn_clip(name: str) -> Case:
    fields = _architecture("chinese_clip", name)
    return _cosine(
        "torch twin",
        _twin("CNCLIP", fields),
        _network("chinese_clip.CNCLIP", "CNCLIPConfig", fields),
        52,
        21128,
        False,
    )


IMAGE_REWARD = {
    "vision": {"image_size": 224, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16},
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    },
}


def _image_reward_here(network, params, ids, images):
    import jax.numpy as jnp

    return network(params, jnp.asarray(ids), images.astype(params["blip.text_proj.kernel"].dtype))


def _aesthetic_there():
    import torch_twins
    from torch import nn

    return nn.ModuleDict(
        {
            "clip": _transformers("CLIPModel", lambda: config_of("clip_score"))(),
            "head": torch_twins.score_mlp(768),
        }
    )


def _aesthetic_here():
    from flax import nnx

    from r0_jax.models.clip import CLIPConfig, CLIPModel
    from r0_jax.models.score_mlp import ScoreMLP
    from r0_jax.rewards.tower import normalize
    from r0_jax.weights.network import Network

    class Aesthetic(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.config = CLIPConfig.from_json(config_of("clip_score"))
            self.clip = CLIPModel(self.config, rngs=rngs)
            self.head = ScoreMLP(768, rngs=rngs)

        def __call__(self, images):
            dtype = self.clip.visual_projection.kernel.get_value().dtype
            return self.head(normalize(self.clip.image_features(images.astype(dtype))))

    return Network.abstract(Aesthetic)


# HPSv3 has 32 vision blocks, 28 language layers and 151,658 words.
HPS_V3 = {"vocab_size": 1000, "num_hidden_layers": 1}
BEFORE, AFTER = np.arange(15), np.arange(100, 160)


def _hps_v3_fields():
    published = config_of("hps_v3")
    return published | HPS_V3 | {"vision_config": published["vision_config"] | {"depth": 1}}


def _hps_v3_there():
    import qwen2_vl

    return qwen2_vl.HPSv3(_hps_v3_fields())


def _hps_v3_here(network, params, images):
    images = images.astype(params["model.embed_tokens.embedding"].dtype)
    return network(params, images, BEFORE, AFTER[None])


REWARDS = {
    "hps_v3_one_layer": Case(
        "transformers",
        _hps_v3_there,
        _network("qwen2_vl.HPSv3", "Qwen2VLConfig", _hps_v3_fields),
        lambda: (normal(0, 1, 168, 112, 3),),
        lambda module, images: module(images, BEFORE.tolist(), AFTER[None].tolist()),
        _hps_v3_here,
        ("rm_head.",),
    ),
    "hps_vit_h": _open_clip("ViT-H-14"),
    "open_clip_vit_l": _open_clip("ViT-L-14"),
    "open_clip_vit_bigg": _open_clip("ViT-bigG-14"),
    "pickscore_clip_h": _clip("pickscore"),
    "clip_l": _clip("clip_score"),
    "chinese_clip_b": _cn_clip("ViT-B-16"),
    "chinese_clip_l": _cn_clip("ViT-L-14"),
    "chinese_clip_h": _cn_clip("ViT-H-14"),
    "image_reward": Case(
        "torch twin",
        _twin("ImageReward", lambda: IMAGE_REWARD["vision"], lambda: IMAGE_REWARD["text"]),
        _network("blip.ImageReward", "ImageRewardConfig", dict),
        lambda: (token_ids(35, 30000, False), normal(0, 1, 224, 224, 3)),
        lambda module, *inputs: module(*inputs),
        _image_reward_here,
        ("mlp.",),
    ),
    "cycle_reward": Case(
        "torch twin",
        _twin("CycleReward", lambda: IMAGE_REWARD["vision"], lambda: IMAGE_REWARD["text"]),
        _network("blip.CycleReward", "ImageRewardConfig", dict),
        lambda: (token_ids(128, 30000, False), normal(0, 1, 224, 224, 3)),
        lambda module, *inputs: module(*inputs),
        _image_reward_here,
        ("mlp.",),
    ),
    "aesthetic": Case(
        "transformers and torch twin",
        _aesthetic_there,
        _aesthetic_here,
        lambda: (normal(0, 1, 224, 224, 3),),
        lambda module, images: module["head"]["layers"](
            _unit(module["clip"].get_image_features(images).pooler_output)
        )[:, 0],
        lambda network, params, images: network(params, images),
        ("head.",),
    ),
}


# --- generators: denoising networks, autoencoders, text encoders ----------------------------------

TIMESTEPS = np.asarray([251.0], np.float32)
TIME_IDS = np.asarray([[1024, 1024, 0, 0, 1024, 1024]], np.float32)


def _unet_there(module, latents, prompt_embeds, *pooled):
    import torch

    added = {"text_embeds": pooled[0], "time_ids": torch.tensor(TIME_IDS)} if pooled else None
    return module(latents, torch.tensor(TIMESTEPS), prompt_embeds, added_cond_kwargs=added).sample


def _unet_here(network, params, latents, prompt_embeds, *pooled):
    import jax.numpy as jnp

    added = (
        {"pooled_prompt_embeds": pooled[0], "add_time_ids": jnp.asarray(TIME_IDS)} if pooled else {}
    )
    return network(params, latents, jnp.asarray(TIMESTEPS), prompt_embeds, **added)


def _lcm_there(module, latents, prompt_embeds, guidance):
    import torch

    return module(latents, torch.tensor(TIMESTEPS), prompt_embeds, timestep_cond=guidance).sample


def _lcm_here(network, params, latents, prompt_embeds, guidance):
    import jax.numpy as jnp

    return network(params, latents, jnp.asarray(TIMESTEPS), prompt_embeds, timestep_cond=guidance)


def _sd3_there(module, latents, prompt_embeds, pooled):
    import torch

    return module(latents, prompt_embeds, pooled, torch.tensor(TIMESTEPS)).sample


def _sd3_here(network, params, latents, prompt_embeds, pooled):
    import jax.numpy as jnp

    return network(params, latents, jnp.asarray(TIMESTEPS), prompt_embeds, pooled)


def _autoencoder(
    kind: str, fields: Callable[[], dict], channels: int, gradient: float = GRADIENT
) -> Case:
    """Decodes and encodes."""
    path = {"AutoencoderKL": "autoencoder_kl", "AutoencoderTiny": "autoencoder_tiny"}[kind]

    def theirs(module, latents, images):
        encoded = module.encode(images)
        encoded = encoded.latent_dist.mean if kind == "AutoencoderKL" else encoded.latents
        return module.decode(latents).sample, encoded

    def ours(network, params, latents, images):
        encoded = network.apply(params, "encode", images)
        encoded = encoded[0] if kind == "AutoencoderKL" else encoded
        return network.apply(params, "decode", latents), encoded

    return Case(
        "diffusers",
        _diffusers(kind, fields),
        _network(f"{path}.{kind}", f"{kind}Config", fields),
        lambda: (normal(0, 1, 16, 16, channels), 0.5 * normal(1, 1, 64, 64, 3)),
        theirs,
        ours,
        gradient=gradient,
    )


def _text(
    kind: str,
    path: str,
    config: str,
    fields: Callable[[], dict],
    words: int,
    parts: tuple[tuple[str, str], ...],
) -> Case:
    """`parts` are (our name, theirs) of the outputs; both want "" where the output is one array."""

    def theirs(module, ids):
        found = module(ids)
        return [getattr(found, name) for _, name in parts]

    def ours(network, params, ids):
        import jax.numpy as jnp

        found = network(params, jnp.asarray(ids))
        return [getattr(found, name) if name else found for name, _ in parts]

    return Case(
        "transformers",
        _transformers(kind, fields),
        _network(path, config, fields),
        lambda: (token_ids(77, words, kind.startswith("CLIP")),),
        theirs,
        ours,
    )


# --- Z-Image: a block at a time, for 6 and 4 G parameters do not fit into memory twice -----------


def _z_image_block(modulation: bool) -> Case:
    """A block of the transformer; without `modulation` one that refines captions."""

    def module():
        from diffusers.models.transformers import transformer_z_image

        return transformer_z_image.ZImageTransformerBlock(
            0, 3840, 30, 30, 1e-5, qk_norm=True, modulation=modulation
        )

    def network():
        from r0_jax.models import transformer_z_image
        from r0_jax.weights.network import Network

        class Block(transformer_z_image.ZImageTransformerBlock):
            def __init__(self, rngs):
                self.config = transformer_z_image.ZImageTransformer2DConfig.from_json(
                    config_of("z_image/transformer")
                )
                super().__init__(self.config, modulation=modulation, rngs=rngs)

        return Network.abstract(Block)

    angles = 100 * normal(2, 1, 320, 64)

    def theirs(module, x, *conditioning):
        import torch

        turns = torch.polar(torch.ones(angles.shape), torch.from_numpy(angles))
        return module(x, None, turns, *conditioning)

    def ours(network, params, x, *conditioning):
        import jax.numpy as jnp

        return network(params, x, jnp.asarray(angles), None, *conditioning)

    def inputs():
        return (normal(0, 1, 320, 3840), *[normal(1, 1, 256)] * modulation)

    return Case("diffusers", module, network, inputs, theirs, ours)


def _qwen3() -> Case:
    """The table of tokens and two of the 36 layers, which are all alike."""

    def fields():
        return config_of("z_image/text_encoder") | {"num_hidden_layers": 2}

    def theirs(module, ids):
        found = module(ids, output_hidden_states=True)
        return [found.hidden_states[1], found.last_hidden_state]

    def ours(network, params, ids):
        import jax.numpy as jnp

        ids = jnp.asarray(ids)
        return [*network.apply(params, "hidden_states", ids, (1,)), network(params, ids)]

    return Case(
        "transformers",
        _transformers("Qwen3Model", fields),
        _network("qwen3.Qwen3Model", "Qwen3Config", fields),
        lambda: (token_ids(512, 151643, False),),
        theirs,
        ours,
    )


SD3_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
BIG_G_TEXT = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "eos_token_id": 2,
}


def _unet(name: str, inputs: Callable[[], tuple], there=_unet_there, here=_unet_here) -> Case:
    return Case(
        "diffusers",
        _diffusers("UNet2DConditionModel", lambda: config_of(name)),
        _network(
            "unet_2d_condition.UNet2DConditionModel",
            "UNet2DConditionConfig",
            lambda: config_of(name),
        ),
        inputs,
        there,
        here,
    )


LAST = ("last_hidden_state", "last_hidden_state")

GENERATORS = {
    "sd15_unet": _unet(
        "stable_diffusion/unet", lambda: (normal(0, 1, 16, 16, 4), normal(1, 1, 77, 768))
    ),
    "lcm_unet": _unet(
        "lcm-dreamshaper-v7-unet",
        lambda: (normal(0, 1, 16, 16, 4), normal(1, 1, 77, 768), normal(2, 1, 256)),
        _lcm_there,
        _lcm_here,
    ),
    "sdxl_unet": _unet(
        "stable_diffusion_xl/unet",
        lambda: (normal(0, 1, 16, 16, 4), normal(1, 1, 77, 2048), normal(2, 1, 1280)),
    ),
    "sd3_transformer": Case(
        "diffusers",
        _diffusers("SD3Transformer2DModel", lambda: config_of("stable_diffusion_3/transformer")),
        _network(
            "transformer_sd3.SD3Transformer2DModel",
            "SD3Transformer2DConfig",
            lambda: config_of("stable_diffusion_3/transformer"),
        ),
        lambda: (normal(0, 1, 16, 16, 16), normal(1, 1, 154, 4096), normal(2, 1, 2048)),
        _sd3_there,
        _sd3_here,
    ),
    "sd_vae": _autoencoder("AutoencoderKL", lambda: config_of("stable_diffusion/vae"), 4),
    "sd3_vae": _autoencoder(
        "AutoencoderKL", lambda: config_of("stable_diffusion/vae") | SD3_VAE, 16
    ),
    "taesd": _autoencoder(
        "AutoencoderTiny", lambda: config_of("taesd"), 4, gradient=1e-2
    ),  # rounding decides a few of its ReLUs
    "flux1_vae": _autoencoder("AutoencoderKL", lambda: config_of("z_image/vae"), 16),
    "taesd3": _autoencoder("AutoencoderTiny", lambda: config_of("taesd3"), 16),
    "clip_l_text": _text(
        "CLIPTextModel",
        "clip.CLIPTextModel",
        "CLIPTextConfig",
        lambda: config_of("stable_diffusion/text_encoder"),
        49408,
        (LAST, ("pooled", "pooler_output")),
    ),
    "clip_bigg_text": _text(
        "CLIPTextModelWithProjection",
        "clip.CLIPTextModelWithProjection",
        "CLIPTextConfig",
        lambda: BIG_G_TEXT,
        49408,
        (LAST, ("pooled", "text_embeds")),
    ),
    "taiyi_bert": _text(
        "BertModel",
        "bert.BertModel",
        "BertConfig",
        lambda: config_of("taiyi/text_encoder"),
        21128,
        (LAST, ("pooled", "pooler_output")),
    ),
    "t5_xxl": _text(
        "T5EncoderModel",
        "t5.T5EncoderModel",
        "T5Config",
        lambda: config_of("stable_diffusion_3/text_encoder_3"),
        32128,
        (("", "last_hidden_state"),),
    ),
    "z_image_block": _z_image_block(modulation=True),
    "z_image_refiner": _z_image_block(modulation=False),
    "qwen3_two_layers": _qwen3(),
}
CASES = REWARDS | GENERATORS


# --- PyTorch's side -------------------------------------------------------------------------------


def in_torch(case: Case) -> dict[str, np.ndarray]:
    """Outputs, and gradients of their sum weighted at random; images as [B, H, W, C]."""
    import accelerate
    import torch
    from parity import to_jax, to_torch

    with accelerate.init_empty_weights(include_buffers=False):
        module = case.module().eval()
    drawn = {}  # tied parameters are one object, and stay one
    for name, empty in list(module.named_parameters(remove_duplicate=False)):
        if id(empty) not in drawn:
            value = torch.from_numpy(draw(name, tuple(empty.shape)))
            drawn[id(empty)] = empty, torch.nn.Parameter(value, requires_grad=False)
        parent, _, last = name.rpartition(".")
        module.get_submodule(parent)._parameters[last] = drawn[id(empty)][1]
    if hasattr(module, "tie_weights"):  # of transformers: T5's tokens
        module.tie_weights()
    for name, buffer in module.named_buffers():
        if name in module.state_dict() and buffer.is_floating_point():  # SD3's table of places
            buffer.copy_(torch.from_numpy(draw(name, tuple(buffer.shape))))
    inputs = [to_torch(x) for x in case.inputs()]
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    with torch.set_grad_enabled(bool(floats)):
        outputs = case.theirs(module, *inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    found = {f"output {i}": to_jax(x) for i, x in enumerate(outputs)}
    if floats:
        sum(
            (x * to_torch(weights(i, to_jax(x).shape))).sum() for i, x in enumerate(outputs)
        ).backward()
        found |= {f"gradient {i}": to_jax(x.grad) for i, x in enumerate(floats)}
    return found


def weights(i: int, shape: tuple[int, ...]) -> np.ndarray:
    """Of output `i` in the sum whose gradient is taken."""
    return normal(100 + i, *shape)


# --- ours -----------------------------------------------------------------------------------------


def in_jax(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, int]:
    """The same in float32; in bfloat16 for rewards, else None; and the number of parameters."""
    import jax
    import jax.numpy as jnp
    from fast_xla import OPTIONS

    from r0_jax.weights import convert

    jax.config.update("jax_default_matmul_precision", "highest")
    network = case.network()
    params = {}
    for name, struct in network.shapes.items():  # one tensor's two copies at a time
        value = draw(convert.to_key(name), convert.file_shape(name, struct.shape))
        params[name] = jnp.asarray(convert.from_checkpoint(name, value))
    inputs = case.inputs()
    places = [i for i, x in enumerate(inputs) if x.dtype == np.float32]

    # Unoptimized, the gradient of a vision tower's patches takes minutes; the denoising networks
    # take minutes to optimize.
    @jax.jit(compiler_options=OPTIONS if case.keeps is None else None)
    def run(params, floats):
        def forward(values):
            whole = list(inputs)
            for i, value in zip(places, values, strict=True):
                whole[i] = value
            return jax.tree.leaves(case.ours(network, params, *whole))

        if not floats:
            return forward(floats), []
        outputs, pullback = jax.vjp(forward, floats)
        return outputs, pullback(
            [jnp.asarray(weights(i, x.shape), x.dtype) for i, x in enumerate(outputs)]
        )[0]

    def named(params):
        outputs, gradients = run(params, [jnp.asarray(inputs[i]) for i in places])
        return {
            f"{what} {i}": np.asarray(x, np.float32)
            for what, values in (("output", outputs), ("gradient", gradients))
            for i, x in enumerate(values)
        }

    count, found, half = sum(x.size for x in params.values()), named(params), None
    if case.keeps is not None:
        for name in params:
            if not name.startswith(case.keeps):
                params[name] = params[name].astype(jnp.bfloat16)
        half = named(params)
    return found, half, count


def compare(case: Case, theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is measured, by name."""
    found, half, count = in_jax(case)
    assert found.keys() == theirs.keys()
    measured: dict[str, Any] = {"reference": case.reference, "parameters": count}
    for kind in ("output", "gradient"):
        errors = [
            float(np.abs(found[name] - other).max() / np.abs(other).max())
            for name, other in theirs.items()
            if name.startswith(kind)
        ]
        measured[kind] = max(errors, default=None)
    if half is not None:
        a, b = found["gradient 0"].ravel(), half["gradient 0"].ravel()
        measured["bfloat16 output"] = float(np.abs(half["output 0"] - found["output 0"]).max())
        measured["bfloat16 cosine"] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return measured


# --- one case in two processes --------------------------------------------------------------------


def fingerprint() -> str:
    """Of the code and the versions that a result depends on."""
    weights = ROOT / "r0_jax" / "weights"
    paths = [
        *sorted((ROOT / "r0_jax" / "models").glob("*.py")),
        weights / "network.py",
        weights / "convert.py",
        Path(__file__),
        *map(Path(__file__).with_name, ("torch_twins.py", "qwen2_vl.py")),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths))
    for package in ("jax", "flax", "torch", "diffusers", "transformers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


def side(name: str, which: str) -> None:
    """What one of the two processes does."""
    begin, folder = time.perf_counter(), RESULTS / "running"
    if which == "torch":
        np.savez(folder / f"{name}.npz", **in_torch(CASES[name]))
        measured = {}
    else:
        with np.load(folder / f"{name}.npz") as file:
            measured = compare(CASES[name], dict(file))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    measured |= {f"{which} seconds": time.perf_counter() - begin, f"{which} GiB": peak}
    (folder / f"{name}.{which}.json").write_text(json.dumps(measured))


def read(name: str) -> dict[str, Any] | None:
    """What was measured of this code and these versions, if it was."""
    path = RESULTS / f"{name}.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    return measured if measured.get("fingerprint") == fingerprint() else None


def measure(name: str) -> dict[str, Any]:
    """What `read` returns, measured now if it is not there."""
    if (measured := read(name)) is not None:
        return measured
    folder, measured = RESULTS / "running", {"fingerprint": fingerprint()}
    folder.mkdir(parents=True, exist_ok=True)
    for which in ("torch", "jax"):
        subprocess.run(
            [sys.executable, __file__, name, f"--side={which}"],
            check=True,
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        measured |= json.loads((folder / f"{name}.{which}.json").read_text())
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    new = RESULTS / f".{name}.json"
    new.write_text(json.dumps(measured, indent=1))
    new.replace(RESULTS / f"{name}.json")
    return measured


def table() -> str:
    """Markdown of all that was measured."""
    header = (
        "| network | parameters | reference | output | gradient | bfloat16 score | "
        "bfloat16 cosine | PyTorch | JAX |\n|---|---:|---|---:|---:|---:|---:|---:|---:|\n"
    )

    def row(name: str, m: dict[str, Any]) -> str:
        def number(key: str, form: str) -> str:
            return "" if m.get(key) is None else format(m[key], form)

        sides = [f"{m[f'{x} seconds']:.0f} s, {m[f'{x} GiB']:.1f} GiB" for x in ("torch", "jax")]
        return (
            f"| `{name}` | {m['parameters'] / 1e6:,.0f} M | {m['reference']} | "
            f"{number('output', '.1e')} | {number('gradient', '.1e')} | "
            f"{number('bfloat16 output', '.1e')} | {number('bfloat16 cosine', '.4f')} | "
            f"{' | '.join(sides)} |\n"
        )

    return header + "".join(row(name, m) for name in CASES if (m := read(name)) is not None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "names", nargs="*", choices=[*CASES, []], metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--side", choices=["torch", "jax"])
    given = parser.parse_args()
    if given.side:
        side(given.names[0], given.side)
    else:
        for chosen in given.names or CASES:
            measure(chosen)
        print(table())
