"""Stable Diffusion 1.x, and Taiyi, which reads Chinese with a BERT in place of CLIP.

It mirrors diffusers `pipelines/stable_diffusion/pipeline_stable_diffusion.py`.
"""

from collections.abc import Sequence
from pathlib import Path

from r0_jax.errors import InputError
from r0_jax.pipelines.folder import BERT_TOKENIZERS, CLIP_TOKENIZERS, Folder, open_folder
from r0_jax.pipelines.pipeline import Conditioning, Pipeline, Tokens
from r0_jax.pipelines.tokenizers import tokenize
from r0_jax.weights.network import Params

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "BertModel"),
    "tokenizer": (*CLIP_TOKENIZERS, *BERT_TOKENIZERS),
}
# Fields of the scheduler's config that the stock pipelines of this family overrule.
OVERRULED = {"steps_offset": 1, "clip_sample": False}


class StableDiffusionPipeline(Pipeline):
    """A network that is told the last hidden state of one text encoder; pads are not masked."""

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return "input_ids", padded to the tokenizer's length or the encoder's, if shorter."""
        tokenizer = self.tokenizers["tokenizer"]
        positions = self.networks["text_encoder"].config.max_position_embeddings
        return {
            "input_ids": tokenize(tokenizer, prompts, min(tokenizer.model_max_length, positions))
        }

    def encode_text(self, params: dict[str, Params], tokens: Tokens) -> Conditioning:
        """Return "prompt_embeds": the last hidden state, of CLIP after its final LayerNorm."""
        text = self.networks["text_encoder"](params["text_encoder"], tokens["input_ids"])
        return {"prompt_embeds": text.last_hidden_state}

    @property
    def embed_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return [T, D] of "prompt_embeds"."""
        return {"prompt_embeds": (None, self.networks["unet"].config.cross_attention_dim)}


def load(
    folder: str | Path, dtype: str = "float32", text: bool = True, images: bool = True
) -> StableDiffusionPipeline:
    """Read a diffusers folder of Stable Diffusion 1.x.

    Args:
      dtype: of the parameters, which stay in their files until they are placed.
      text, images: as for `families.load`.
    Raises:
      InputError: a part is missing, half downloaded, of another family, or does not fit its
        config; the message says which.
    """
    opened = open_folder(
        Path(folder),
        "StableDiffusionPipeline",
        PARTS,
        overruled=OVERRULED,
        text=text,
        images=images,
    )
    check_fit(opened)
    return StableDiffusionPipeline(
        opened.path,
        opened.networks,
        opened.load(dtype),
        opened.tokenizers,
        opened.scheduler_config,
    )


def check_fit(folder: Folder) -> None:
    """Raise InputError unless the parts of a folder are made for each other."""
    unet, vae = (folder.networks[part].config for part in ("unet", "vae"))
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
        ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim"),
        "a Stable Diffusion 1.x network is told the prompt and nothing else",
    )
    if "text_encoder" not in folder.networks:
        return
    folder.check_equal(
        [
            (
                "unet's cross_attention_dim",
                unet.cross_attention_dim,
                "text_encoder's hidden_size",
                folder.networks["text_encoder"].config.hidden_size,
            )
        ]
    )
    folder.check_vocabulary()
    fields = folder.fields["text_encoder"]
    if fields.get("text_config", fields).get("use_attention_mask"):
        raise InputError(
            f"{folder.path}/text_encoder/config.json: use_attention_mask = true is "
            "not supported: the padding is always attended to"
        )
