"""Stable Diffusion 1.x folders: tokens -> prompt_embeds -> noise prediction -> images.

The protocol that every family offers, and all that the rest of the program knows of one: the
fields and methods of `StableDiffusionPipeline` below.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import CLIPTokenizer

from r0_jax import convert, schedulers
from r0_jax.errors import InputError
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.models.clip import CLIPTextConfig, CLIPTextModel
from r0_jax.models.config import read_json
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.network import Network, Params

Conditioning = dict[str, jax.Array]  # what the network is told of the prompts; leading axis batch

# Part of the folder -> (class in model_index.json, how to build the network, stem of the weights).
PARTS: dict[str, tuple[str, Callable[[dict[str, Any], nnx.Rngs], nnx.Module], str]] = {
    "unet": ("UNet2DConditionModel",
             lambda fields, rngs: UNet2DConditionModel(
                 UNet2DConditionConfig.from_json(fields), rngs=rngs),
             "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL",
            lambda fields, rngs: AutoencoderKL(AutoencoderKLConfig.from_json(fields), rngs=rngs),
            "diffusion_pytorch_model"),
    "text_encoder": ("CLIPTextModel",
                     lambda fields, rngs: CLIPTextModel(
                         CLIPTextConfig.from_json(fields), rngs=rngs),
                     "model"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusionPipeline:
    """A loaded folder. Methods take the parameters they use, so that a jitted step can own them."""

    folder: Path
    networks: dict[str, Network]
    params: dict[str, Params]  # of each part, on the host
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]

    generator_part = "unet"  # the part that R0 trains

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of one sample's latents at the resolution that the folder was trained for."""
        config = self.networks["unet"].config
        size = config.sample_size
        if size is None:
            raise InputError(f"{self.folder}/unet/config.json has no sample_size: add the latents' "
                             "height, e.g. 64 for 512 px")
        height, width = size if isinstance(size, tuple) else (size, size)
        return (height, width, config.in_channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h, w, 3] of one sample's image."""
        height, width, _ = self.latent_shape
        factor = 2 ** (len(self.networks["vae"].config.block_out_channels) - 1)
        return (height * factor, width * factor, 3)

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b t"]:
        """Token ids, padded to the tokenizer's length, which the encoder's may limit; warns with
        the share of prompts cut off."""
        positions = self.networks["text_encoder"].config.max_position_embeddings
        return tokenize(self.tokenizer, prompts, min(self.tokenizer.model_max_length, positions))

    def encode_prompt(self, params: dict[str, Params], input_ids: Int[Array, "b t"]
                      ) -> Conditioning:
        """The text encoder's last hidden state, after its final LayerNorm; pads are not masked."""
        text = self.networks["text_encoder"](params["text_encoder"], input_ids)
        return {"prompt_embeds": text.last_hidden_state}

    def denoise(self, unet: Params, latents: Float[Array, "b h w c"], timesteps: Float[Array, " b"],
                conditioning: Conditioning) -> Float[Array, "b h w c"]:
        """One network call, computed in the dtype of the parameters, returned in float32."""
        dtype = unet["conv_in.kernel"].dtype
        output = self.networks["unet"](unet, latents.astype(dtype), timesteps,
                                       conditioning["prompt_embeds"].astype(dtype))
        return output.astype(jnp.float32)

    def features(self, unet: Params, latents: Float[Array, "b h w c"],
                 timesteps: Float[Array, " b"], conditioning: Conditioning
                 ) -> Float[Array, "b hm wm cm"]:
        """The network's mid-block features, in float32."""
        dtype = unet["conv_in.kernel"].dtype
        features = self.networks["unet"].apply(
            unet, "mid_features", latents.astype(dtype), timesteps,
            conditioning["prompt_embeds"].astype(dtype))
        return features.astype(jnp.float32)

    def decode(self, vae: Params, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Images in [0, 1], clipped as the pipeline's postprocessing does; float32."""
        return jnp.clip(self.decode_unclipped(vae, latents), 0.0, 1.0)

    def decode_unclipped(self, vae: Params, latents: Float[Array, "b h w c"]
                         ) -> Float[Array, "b h2 w2 3"]:
        """Images around [0, 1]: training needs the gradient of a pixel that went beyond."""
        # A shift_factor plays no part, as in the stock pipeline: later families have one.
        latents = latents / self.networks["vae"].config.scaling_factor
        images = self.networks["vae"].apply(vae, "decode",
                                            latents.astype(vae["decoder.conv_in.kernel"].dtype))
        return images.astype(jnp.float32) / 2 + 0.5


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int
             ) -> Int[np.ndarray, "b t"]:
    """Ids [B, length] int32; the end-of-text token is kept when a prompt is cut off."""
    whole = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    cut = sum(len(ids) > length for ids in whole)
    if cut:
        warnings.warn(f"{cut} of {len(whole)} prompts ({cut / len(whole):.0%}) are longer than "
                      f"{length} tokens and are cut off there", stacklevel=3)
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True,
                    verbose=False).input_ids
    return np.asarray(ids, np.int32)


def load(folder: str | Path, dtype: str = "float32") -> StableDiffusionPipeline:
    """Reads a diffusers folder of Stable Diffusion 1.x; parameters arrive on the host as `dtype`.

    Raises:
      InputError: a part is missing, half downloaded, of another family, or does not fit its
        config; the message says which.
    """
    folder = Path(folder)
    # What may be wrong is looked at before gigabytes are read.
    scheduler_class = check_family(folder)
    # Stock pipelines build the class of the index, whatever the scheduler's own file says.
    scheduler_config = (load_scheduler_config(folder / "scheduler")
                        | {"_class_name": scheduler_class})
    tokenizer = load_tokenizer(folder / "tokenizer")
    fields = {part: read_json(folder / part / "config.json") for part in PARTS}
    mended = mend_sample_size(fields["unet"])
    if mended != fields["unet"]:
        warnings.warn(f"{folder}/unet/config.json is of an old diffusers and says sample_size "
                      f"{fields['unet']['sample_size']}: 64 is used, as diffusers does",
                      stacklevel=2)
    fields["unet"] = mended
    files = {part: convert.find_files(folder / part, stem) for part, (*_, stem) in PARTS.items()}
    networks = {part: Network.abstract(lambda rngs, b=build, f=fields[part]: b(f, rngs))
                for part, (_, build, _) in PARTS.items()}
    check_fit(folder, networks, fields["text_encoder"], tokenizer)
    params = {part: convert.load(files[part], networks[part], dtype) for part in PARTS}
    return StableDiffusionPipeline(folder, networks, params, tokenizer, scheduler_config)


def load_scheduler_config(folder: Path) -> dict[str, Any]:
    """The folder's scheduler_config.json, with the two fields that stock pipelines overrule."""
    config = read_json(folder / "scheduler_config.json")
    return {**config, "steps_offset": 1, "clip_sample": False}


def mend_sample_size(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of `unet/config.json`, with the one that stock pipelines overrule in files of
    diffusers before 0.9: their sample_size was not that of the training."""
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("_diffusers_version")))
    size = fields.get("sample_size")
    if version and (int(version[1]), int(version[2])) < (0, 9) and type(size) is int and size < 64:
        return fields | {"sample_size": 64}
    return fields


def check_fit(folder: Path, networks: dict[str, Network], text_fields: dict[str, Any],
              tokenizer: CLIPTokenizer) -> None:
    """InputError unless the parts of a folder are made for each other."""
    unet, vae, text = (networks[part].config for part in ("unet", "vae", "text_encoder"))
    for left, a, right, b in (
            ("unet's cross_attention_dim", unet.cross_attention_dim,
             "text_encoder's hidden_size", text.hidden_size),
            ("unet's in_channels", unet.in_channels, "vae's latent_channels", vae.latent_channels),
            ("unet's out_channels", unet.out_channels,
             "vae's latent_channels", vae.latent_channels),
            ("vae's out_channels", vae.out_channels, "number of an image's channels", 3)):
        if a != b:
            raise InputError(f"{folder}: the {left} is {a}, but the {right} is {b}: these parts "
                             "belong to different models")
    for field in ("addition_embed_type", "class_embed_type", "num_class_embeds",
                  "time_cond_proj_dim"):
        if (value := getattr(unet, field)) is not None:
            raise InputError(f"{folder}/unet/config.json: {field} = {json.dumps(value)} is not "
                             "supported here: a Stable Diffusion 1.x network is told the prompt "
                             "and nothing else")
    highest = max(tokenizer.get_vocab().values())
    if highest >= text.vocab_size:
        raise InputError(f"{folder}: the tokenizer has ids up to {highest}, the text_encoder knows "
                         f"{text.vocab_size} tokens: they belong to different models")
    if text_fields.get("text_config", text_fields).get("use_attention_mask"):
        raise InputError(f"{folder}/text_encoder/config.json: use_attention_mask = true is not "
                         "supported: the padding is always attended to")


def check_family(folder: Path) -> str:
    """The class of the scheduler; InputError unless model_index.json says that the folder is a
    Stable Diffusion 1.x one."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the diffusers folder of a pretrained "
                         "pipeline (the one that holds model_index.json)")
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name != "StableDiffusionPipeline":
        raise InputError(f"{folder} holds a {name}, which is not supported; "
                         "supported: StableDiffusionPipeline")
    for part, (expected, *_) in PARTS.items():
        entry = index.get(part)
        found = entry[-1] if isinstance(entry, list) and entry else entry
        if found != expected:
            raise InputError(f"{folder}/model_index.json: {part} is a {found}, not a {expected}")
    scheduler = index.get("scheduler")
    if not (isinstance(scheduler, list) and scheduler and isinstance(scheduler[-1], str)):
        raise InputError(f"{folder}/model_index.json: scheduler is {json.dumps(scheduler)}: the "
                         'class is expected, as in ["diffusers", "DDIMScheduler"]')
    return scheduler[-1]


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder; InputError if its files are missing or broken."""
    needed = [folder / "vocab.json", folder / "merges.txt"]
    if not (folder / "tokenizer.json").is_file():
        for path in needed:
            if not path.is_file():
                raise InputError(f"{path} is missing: is the folder complete?")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer(["a"])  # where the vocabulary is empty, only this fails
        lost, count = _unreachable(tokenizer)
    except Exception as e:  # tokenizers raises bare Exception on malformed files
        raise InputError(f"{folder} does not hold a readable CLIP tokenizer ({e})") from None
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length < 2:  # both ends of a prompt
        raise InputError(f"{folder}/tokenizer_config.json: model_max_length = {length!r} is no "
                         "number of tokens")
    if lost > 0.01 * count:
        name = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "merges.txt"
        raise InputError(f"{folder / name} is incomplete: its merges never make {lost} of {count} "
                         "tokens: download it again")
    return tokenizer


def _unreachable(tokenizer: CLIPTokenizer) -> tuple[int, int]:
    """How many tokens of several letters no merge makes, and of how many. A merges.txt cut short
    at the end of a line is read without complaint, and then prompts fall into other tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {"".join(merge) for merge in model["merges"]} | set(tokenizer.all_special_tokens)
    longer = [token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1]
    return sum(token not in made for token in longer), len(longer)


def few_step_scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler config that a K-step generator is trained and exported with.

    Deterministic DDIM on trailing timesteps that ends at sigma 0: `num_inference_steps=4` visits
    999, 749, 499, 249 in any stock pipeline.
    """
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
            "prediction_type", "rescale_betas_zero_snr")
    schedulers.alphas_cumprod(config)  # names what is not supported
    return {"_class_name": "DDIMScheduler", **{k: config[k] for k in kept if k in config},
            "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
            "thresholding": False, "timestep_spacing": "trailing"}
