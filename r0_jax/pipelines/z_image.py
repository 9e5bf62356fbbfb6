"""Z-Image and Z-Image-Turbo: one transformer for image and caption, told by Qwen3.

It mirrors diffusers `pipelines/z_image/pipeline_z_image.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r0_jax.models.transformer_z_image import MULTIPLE
from r0_jax.pipelines.folder import QWEN2_TOKENIZERS, Folder, open_folder
from r0_jax.pipelines.pipeline import LENGTHS, Conditioning, Pipeline, Tokens
from r0_jax.pipelines.tokenizers import tokenize
from r0_jax.weights.network import Params

PARTS = {
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "tokenizer": QWEN2_TOKENIZERS,
}
# A prompt as Qwen3's chat template writes it.
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 512  # the stock pipeline's max_sequence_length
PIXELS = 1024  # of the stock pipeline's images; no config says it


class ZImagePipeline(Pipeline):
    """A network that is told the hidden states of a language model, of the prompt's tokens alone.

    The states are those before the last layer. Prompts have different lengths, which the network
    is told: "prompt_lengths". Rows after them are zeros.

    The stock pipeline computes cond + w (cond - uncond). Here guidance is uncond + scale (cond -
    uncond), as in all other families: scale = w + 1.
    """

    generator_part = "transformer"
    embeds = ("prompt_embeds", LENGTHS)
    no_guidance = 0
    uses_shift_factor = True

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return "input_ids" of the prompts in their template, padded to 512."""
        texts = [f"{BEFORE}{prompt}{AFTER}" for prompt in prompts]
        tokenizer = self.tokenizers["tokenizer"]
        return {"input_ids": tokenize(tokenizer, texts, TOKENS, padding_side="right")}

    def shorten(self, splits: Mapping[str, Tokens]) -> dict[str, Tokens]:
        """Return "input_ids" without columns that are pads in all sets, in steps of 32 tokens.

        The network fills prompts up to multiples of 32 in any case.
        """
        longest = max(int(self._lengths(tokens["input_ids"]).max()) for tokens in splits.values())
        stop = -(-longest // MULTIPLE) * MULTIPLE
        return {
            split: {"input_ids": tokens["input_ids"][:, :stop]} for split, tokens in splits.items()
        }

    def _lengths(self, ids: Int[jax.Array | np.ndarray, "b t"]) -> Int[Array, " b"]:
        places = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)[None]
        is_pad = jnp.asarray(ids) == self.tokenizers["tokenizer"].pad_token_id
        return jnp.max(jnp.where(is_pad, 0, places), axis=1)

    def encode_text(self, params: dict[str, Params], tokens: Tokens) -> Conditioning:
        """Return "prompt_embeds" [B, T, D], zeros at pads, and "prompt_lengths" [B] int32."""
        ids, network = jnp.asarray(tokens["input_ids"]), self.networks["text_encoder"]
        lengths = self._lengths(ids)
        last_but_one = network.config.num_hidden_layers - 1
        (states,) = network.apply(params["text_encoder"], "hidden_states", ids, (last_but_one,))
        is_text = jnp.arange(ids.shape[1])[None] < lengths[:, None]
        return {
            "prompt_embeds": jnp.where(is_text[..., None], states, 0),
            LENGTHS: lengths,
        }

    @property
    def embed_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return [T, D] of "prompt_embeds" and [] of "prompt_lengths"."""
        width = self.networks["transformer"].config.cap_feat_dim
        return {"prompt_embeds": (None, width), LENGTHS: ()}

    def denoise(
        self,
        generator: Params,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        conditioning: Conditioning,
    ) -> Float[Array, "b h w c"]:
        """Return noise - image, as of other flow models: the network predicts its negative."""
        return -super().denoise(generator, latents, timesteps, conditioning)

    def _call(self, method, generator, latents, timesteps, conditioning):
        # The network's time runs from noise (0) to image (1).
        return super()._call(method, generator, latents, 1 - timesteps / 1000, conditioning)


def load(
    folder: str | Path, dtype: str = "float32", text: bool = True, images: bool = True
) -> ZImagePipeline:
    """Read a diffusers folder of Z-Image, for images of 1024 x 1024 pixels.

    Args:
      dtype: of the parameters, which stay in their files until they are placed.
      text, images: as for `families.load`.
    Raises:
      InputError: a part is missing, half downloaded, of another family, or does not fit its
        config; the message says which.
    """
    opened = open_folder(
        Path(folder), "ZImagePipeline", PARTS, even_sigmas=True, text=text, images=images
    )
    check_fit(opened)
    pipeline = ZImagePipeline(
        opened.path, opened.networks, opened.load(dtype), opened.tokenizers, opened.scheduler_config
    )
    return pipeline.sized(PIXELS, PIXELS)


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
            ("vae's out_channels", vae.out_channels, "number of an image's channels", 3),
        ]
    )
    if "text_encoder" in folder.networks:
        folder.check_equal(
            [
                (
                    "transformer's cap_feat_dim",
                    transformer.cap_feat_dim,
                    "text_encoder's hidden_size",
                    folder.networks["text_encoder"].config.hidden_size,
                )
            ]
        )
        folder.check_vocabulary()
