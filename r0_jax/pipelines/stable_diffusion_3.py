"""Stable Diffusion 3: a transformer on a straight path from noise, and up to three text encoders.

It mirrors diffusers `pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from r0_jax.errors import InputError
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig
from r0_jax.pipelines.folder import CLIP_TOKENIZERS, T5_TOKENIZERS, Folder, open_folder
from r0_jax.pipelines.pipeline import Conditioning, Pipeline, Tokens
from r0_jax.pipelines.tokenizers import tokenize
from r0_jax.weights.network import Params

PARTS = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
    "tokenizer": CLIP_TOKENIZERS,
    "tokenizer_2": CLIP_TOKENIZERS,
    "tokenizer_3": T5_TOKENIZERS,
}
T5_TOKENS = 256  # the stock pipeline's max_sequence_length


class StableDiffusion3Pipeline(Pipeline):
    """A network that is told the tokens of three encoders, and the pooled text of two.

    The tokens of CLIP-L and bigG lie side by side, filled up with zeros; those of T5 follow.
    Without T5 its tokens are zeros, which the network saw in training too.
    """

    generator_part = "transformer"
    fixed = ("pos_embed.pos_embed",)  # sines and cosines
    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    uses_shift_factor = True

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return "input_ids" and "input_ids_2", both padded to the first tokenizer's length.

        With T5 there is also "input_ids_3", padded to 256 tokens.
        """
        length = self.tokenizers["tokenizer"].model_max_length
        lengths = {"tokenizer": length, "tokenizer_2": length, "tokenizer_3": T5_TOKENS}
        return {
            name.replace("tokenizer", "input_ids"): tokenize(tokenizer, prompts, lengths[name])
            for name, tokenizer in self.tokenizers.items()
        }

    def encode_text(self, params: dict[str, Params], tokens: Tokens) -> Conditioning:
        """Return "prompt_embeds" [B, T + 256, D] and "pooled_prompt_embeds" [B, P1 + P2]."""
        first, second = (
            self.networks[f"text_encoder{n}"](params[f"text_encoder{n}"], tokens[f"input_ids{n}"])
            for n in ("", "_2")
        )
        clip = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        width = self.networks["transformer"].config.joint_attention_dim
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
        if "text_encoder_3" in self.networks:
            t5 = self.networks["text_encoder_3"](params["text_encoder_3"], tokens["input_ids_3"])
        else:
            t5 = jnp.zeros((len(clip), T5_TOKENS, width), clip.dtype)
        return {
            "prompt_embeds": jnp.concatenate([clip, t5], axis=1),
            "pooled_prompt_embeds": jnp.concatenate([first.pooled, second.pooled], axis=-1),
        }

    @property
    def embed_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return [T, D] of "prompt_embeds" and [P1 + P2] of "pooled_prompt_embeds"."""
        config = self.networks["transformer"].config
        return {
            "prompt_embeds": (None, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }


def load(
    folder: str | Path, dtype: str = "float32", text: bool = True, images: bool = True
) -> StableDiffusion3Pipeline:
    """Read a diffusers folder of Stable Diffusion 3.

    Args:
      dtype: of the parameters, which stay in their files until they are placed.
      text, images: as for `families.load`.
    Raises:
      InputError: a part is missing, half downloaded, of another family, or does not fit its
        config; the message says which.
    """
    opened = open_folder(
        Path(folder),
        "StableDiffusion3Pipeline",
        PARTS,
        optional=("text_encoder_3",),
        text=text,
        images=images,
    )
    check_fit(opened)
    return StableDiffusion3Pipeline(
        opened.path, opened.networks, opened.load(dtype), opened.tokenizers, opened.scheduler_config
    )


def check_fit(folder: Folder) -> None:
    """Raise InputError unless the parts of a folder are made for each other."""
    transformer, vae = (folder.networks[part].config for part in ("transformer", "vae"))
    folder.check_equal(
        [
            (
                "transformer's in_channels",
                transformer.in_channels,
                "vae's latent_channels",
                vae.latent_channels,
            ),
            (
                "transformer's out_channels",
                transformer.out_channels,
                "vae's latent_channels",
                vae.latent_channels,
            ),
            ("vae's out_channels", vae.out_channels, "number of an image's channels", 3),
        ]
    )
    size = transformer.sample_size
    if size % transformer.patch_size or size // transformer.patch_size > (
        transformer.pos_embed_max_size
    ):
        raise InputError(
            f"{folder.path}/transformer/config.json: sample_size = {size} is not "
            f"supported: a multiple of patch_size = {transformer.patch_size} up to "
            f"pos_embed_max_size = {transformer.pos_embed_max_size} patches is "
            "expected"
        )
    if "text_encoder" in folder.networks:
        _check_text(folder, transformer)


def _check_text(folder: Folder, transformer: SD3Transformer2DConfig) -> None:
    text, text_2 = (folder.networks[part].config for part in ("text_encoder", "text_encoder_2"))
    rows = [
        (
            "transformer's pooled_projection_dim",
            transformer.pooled_projection_dim,
            "sum of both CLIPs' projection_dim",
            text.projection_dim + text_2.projection_dim,
        )
    ]
    if "text_encoder_3" in folder.networks:
        rows.append(
            (
                "transformer's joint_attention_dim",
                transformer.joint_attention_dim,
                "text_encoder_3's d_model",
                folder.networks["text_encoder_3"].config.d_model,
            )
        )
    folder.check_equal(rows)
    clips = text.hidden_size + text_2.hidden_size
    if clips > transformer.joint_attention_dim:
        raise InputError(
            f"{folder.path}: both CLIPs' hidden_size add up to {clips}, but the "
            f"transformer's joint_attention_dim is {transformer.joint_attention_dim}: "
            "these parts belong to different models"
        )
    length = folder.tokenizers["tokenizer"].model_max_length
    for name, config in (("text_encoder", text), ("text_encoder_2", text_2)):
        if length > config.max_position_embeddings:
            raise InputError(
                f"{folder.path}: the tokenizer's model_max_length is {length}, but "
                f"the {name} has {config.max_position_embeddings} positions"
            )
    folder.check_vocabulary()
