"""SDXL: two CLIP text encoders, and a network that is also told sizes and a pooled prompt.

It mirrors diffusers `pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp

from r0_jax.errors import InputError
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig
from r0_jax.pipelines.folder import CLIP_TOKENIZERS, Folder, open_folder
from r0_jax.pipelines.pipeline import Conditioning, Pipeline, Tokens
from r0_jax.pipelines.tokenizers import tokenize
from r0_jax.weights.network import Params

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": CLIP_TOKENIZERS,
    "tokenizer_2": CLIP_TOKENIZERS,
}


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusionXLPipeline(Pipeline):
    """A network that is told the prompt by two encoders, and sizes.

    It takes the last but one hidden states of both side by side, and the pooled text of the second.
    The sizes are those of an image that was neither cropped nor enlarged.

    Attributes:
      force_zeros_for_empty_prompt: guidance leads away from zeros, not from the empty prompt.
    """

    force_zeros_for_empty_prompt: bool = True

    embeds: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return "input_ids" and "input_ids_2", each padded to its tokenizer's length."""
        columns = {}
        for name, tokenizer in self.tokenizers.items():
            encoder = self.networks[name.replace("tokenizer", "text_encoder")]
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            columns[name.replace("tokenizer", "input_ids")] = tokenize(tokenizer, prompts, length)
        return columns

    def encode_text(self, params: dict[str, Params], tokens: Tokens) -> Conditioning:
        """Return "prompt_embeds" [B, T, D1 + D2] and the second's "pooled_prompt_embeds" [B, P]."""
        first = self.networks["text_encoder"](params["text_encoder"], tokens["input_ids"])
        second = self.networks["text_encoder_2"](params["text_encoder_2"], tokens["input_ids_2"])
        return {
            "prompt_embeds": jnp.concatenate([first.penultimate, second.penultimate], axis=-1),
            "pooled_prompt_embeds": second.pooled,
        }

    def condition(self, embeds: Conditioning) -> Conditioning:
        """Return `embeds` with "add_time_ids" [B, 6] int32: original size, crop, target size."""
        height, width, _ = self.image_shape
        sizes = jnp.asarray([[height, width, 0, 0, height, width]], jnp.int32)
        count = len(embeds["pooled_prompt_embeds"])
        return embeds | {"add_time_ids": jnp.broadcast_to(sizes, (count, 6))}

    @property
    def embed_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return [T, D] of "prompt_embeds" and [P] of "pooled_prompt_embeds"."""
        return {
            "prompt_embeds": (None, self.networks["unet"].config.cross_attention_dim),
            "pooled_prompt_embeds": (pooled_width(self.networks["unet"].config),),
        }

    def encode_negative(
        self, params: dict[str, Params], empty: Tokens, conditioning: Conditioning
    ) -> Conditioning:
        """Return zeros, or the empty prompt where the folder says so; the sizes stay.

        Where prompts were encoded before, the embeddings in `empty` are taken.
        """
        if not self.force_zeros_for_empty_prompt or "prompt_embeds" in empty:
            return super().encode_negative(params, empty, conditioning)
        zeros = {
            name: jnp.zeros_like(conditioning[name])
            for name in ("prompt_embeds", "pooled_prompt_embeds")
        }
        return conditioning | zeros


def load(
    folder: str | Path, dtype: str = "float32", text: bool = True, images: bool = True
) -> StableDiffusionXLPipeline:
    """Read a diffusers folder of SDXL.

    Args:
      dtype: of the parameters, which stay in their files until they are placed.
      text, images: as for `families.load`.
    Raises:
      InputError: a part is missing, half downloaded, of another family, or does not fit its
        config; the message says which.
    """
    opened = open_folder(Path(folder), "StableDiffusionXLPipeline", PARTS, text=text, images=images)
    check_fit(opened)
    zeros = opened.index.get("force_zeros_for_empty_prompt", True)
    return StableDiffusionXLPipeline(
        opened.path,
        opened.networks,
        opened.load(dtype),
        opened.tokenizers,
        opened.scheduler_config,
        force_zeros_for_empty_prompt=bool(zeros),
    )


def pooled_width(unet: UNet2DConditionConfig) -> int:
    """Return the width of the pooled text: that of the network's input less the six sizes'."""
    return unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim


def check_fit(folder: Folder) -> None:
    """Raise InputError unless the parts of a folder are made for each other."""
    unet, vae = (folder.networks[part].config for part in ("unet", "vae"))
    if unet.addition_embed_type != "text_time":
        raise InputError(
            f"{folder.path}/unet/config.json: addition_embed_type = "
            f"{unet.addition_embed_type} is not supported here: an SDXL network has "
            "text_time"
        )
    folder.check_equal(
        [
            ("unet's in_channels", unet.in_channels, "vae's latent_channels", vae.latent_channels),
            (
                "unet's out_channels",
                unet.out_channels,
                "vae's latent_channels",
                vae.latent_channels,
            ),
            ("vae's out_channels", vae.out_channels, "number of an image's channels", 3),
        ]
    )
    folder.check_conditions(
        "unet",
        ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"),
        "an SDXL network is told the prompt and sizes, and nothing else",
    )
    if "text_encoder" not in folder.networks:
        return
    text, text_2 = (folder.networks[part].config for part in ("text_encoder", "text_encoder_2"))
    folder.check_equal(
        [
            (
                "unet's cross_attention_dim",
                unet.cross_attention_dim,
                "sum of both text encoders' hidden_size",
                text.hidden_size + text_2.hidden_size,
            ),
            (
                "unet's projection_class_embeddings_input_dim",
                unet.projection_class_embeddings_input_dim,
                "size of the pooled text and six sizes",
                (text_2.projection_dim + 6 * unet.addition_time_embed_dim),
            ),
        ]
    )
    folder.check_vocabulary()
