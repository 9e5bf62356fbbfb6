"""The protocol of all model families: tokens -> conditioning -> denoised latents -> images.

The rest of the program knows a family by its `Pipeline` only. Families differ in what they tell
the network of a prompt: `tokenize`, `encode_text`, `encode_negative`.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.models.attention_backend import Backend
from r0_jax.pipelines.tokenizers import Tokenizer
from r0_jax.weights.network import Network, Params

MOST_PIXELS = 65_536  # of a side of an image

# [N, T] ids, one entry a tokenizer: "input_ids", "input_ids_2", ...; a batch has the same columns.
# Or the text encoders' outputs, by the names of `Pipeline.embeds`.
Tokens = dict[str, jax.Array | np.ndarray]
# What the network is told of the prompts, by the names of its arguments [B, ...].
Conditioning = dict[str, jax.Array]
LENGTHS = "prompt_lengths"  # [B]: how many rows of "prompt_embeds" a prompt has; the rest is zeros


def take(tokens: Tokens, rows: Shaped[np.ndarray, "..."] | slice) -> Tokens:
    """Return the tokens of some of the prompts."""
    return {name: ids[rows] for name, ids in tokens.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline(abc.ABC):
    """A loaded folder.

    Methods take the parameters that they use, so that a jitted step can own them.

    Attributes:
      networks: of each part ("unet" or "transformer", "vae", "text_encoder", ...).
      params: of each part, `Lazy`: call `lazy.place` before computing with them.
      tokenizers: by their folder: "tokenizer", "tokenizer_2", "tokenizer_3".
      scheduler_config: as the stock pipeline builds it.
      negative: embeddings [1, ...] that guidance leads away from, where there are no text encoders;
        None where the empty prompt is encoded instead.
      size: height and width of the latents; None where the generator's config says them.
    """

    folder: Path
    networks: dict[str, Network]
    params: dict[str, Params]
    tokenizers: dict[str, Tokenizer]
    scheduler_config: SchedulerConfig
    negative: Tokens | None = None
    size: tuple[int, int] | None = None

    generator_part: ClassVar[str] = "unet"  # the part that R0 trains
    fixed: ClassVar[tuple[str, ...]] = ()  # parameters in its file that are never trained
    embeds: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # what `encode_text` returns
    # The stock pipeline's guidance_scale that means none.
    no_guidance: ClassVar[int] = 1
    # The stock pipelines of some families ignore the VAE's shift_factor.
    uses_shift_factor: ClassVar[bool] = False

    @abc.abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return token ids [N, T] int32 of each tokenizer.

        Prompts are padded and cut as the stock pipeline does; a warning says the share cut off.
        """

    def shorten(self, splits: Mapping[str, Tokens]) -> dict[str, Tokens]:
        """Return the tokens of several sets of prompts, as short as the longest of all allows.

        Only families that tell prompts from pads (`LENGTHS`) make any shorter.
        """
        return dict(splits)

    @abc.abstractmethod
    def encode_text(self, params: dict[str, Params], tokens: Tokens) -> Conditioning:
        """Return the text encoders' outputs, by the names of `embeds`."""

    @property
    @abc.abstractmethod
    def embed_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return one prompt's shape of each of `embeds`; None is any length."""

    def encode_prompt(self, params: dict[str, Params], tokens: Tokens) -> Conditioning:
        """Return what the network is told of the prompts.

        Args:
          tokens: may hold other columns of a batch too. Encoded prompts are taken as they are.
        """
        encoded = {name: tokens[name] for name in self.embeds if name in tokens}
        return self.condition(encoded or self.encode_text(params, tokens))

    def condition(self, embeds: Conditioning) -> Conditioning:
        """Return the embeddings of prompts, with all else that the network is told."""
        return embeds

    @property
    def empty(self) -> Tokens:
        """Return what `encode_negative` takes: the tokens of the empty prompt, or its embeddings.

        It is empty where the prompts were encoded without it.
        """
        if "text_encoder" in self.networks:
            return self.tokenize([""])
        return self.negative or {}

    def encode_negative(
        self, params: dict[str, Params], empty: Tokens, conditioning: Conditioning
    ) -> Conditioning:
        """Return what guidance leads away from, in the shapes of `conditioning`.

        Args:
          empty: `Pipeline.empty`.
        """
        return jax.tree.map(
            lambda one, all_: jnp.broadcast_to(one, all_.shape),
            self.encode_prompt(params, empty),
            conditioning,
        )

    def attending(self, backend: Backend) -> "Pipeline":
        """Return the same pipeline, whose networks compute attention by `backend`."""
        return dataclasses.replace(
            self,
            networks={
                part: dataclasses.replace(network, attention=backend)
                for part, network in self.networks.items()
            },
        )

    def sized(self, height: int, width: int) -> "Pipeline":
        """Return the same pipeline for images of `height` x `width` pixels; 0 keeps its own.

        Raises:
          InputError: the VAE or the generator has no latents of such images.
        """
        if not (height or width):
            return self
        config = self.networks[self.generator_part].config
        patch = getattr(config, "patch_size", 1)
        step, most = self.scale * patch, getattr(config, "pos_embed_max_size", None)
        size = (height or self.image_shape[0], width or self.image_shape[1])
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels > MOST_PIXELS:
                raise InputError(f"{name}={pixels} must be at most {MOST_PIXELS}")
            if pixels % step or pixels < step:
                raise InputError(f"{name}={pixels} must be a multiple of {step} for this pipeline")
            if most and pixels > most * step:
                raise InputError(f"{name}={pixels} must be at most {most * step} for this pipeline")
        return dataclasses.replace(self, size=(size[0] // self.scale, size[1] // self.scale))

    @property
    def scale(self) -> int:
        """Return the pixels of an image on each side of one of the latents."""
        return 2 ** (len(self.networks["vae"].config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return [h, w, c] of one sample's latents.

        Raises:
          InputError: there is no `size`, and the network's config does not say it.
        """
        config = self.networks[self.generator_part].config
        size = self.size or config.sample_size
        if size is None:
            raise InputError(
                f"{self.folder}/{self.generator_part}/config.json has no sample_size: "
                "add the latents' height, e.g. 64 for 512 px"
            )
        height, width = size if isinstance(size, tuple) else (size, size)
        return (height, width, config.in_channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return [h, w, 3] of one sample's image."""
        height, width, _ = self.latent_shape
        return (height * self.scale, width * self.scale, 3)

    def denoise(
        self,
        generator: Params,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        conditioning: Conditioning,
    ) -> Float[Array, "b h w c"]:
        """Call the network once, in the dtype of the parameters; return float32."""
        return self._call("__call__", generator, latents, timesteps, conditioning)

    def features(
        self,
        generator: Params,
        latents: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        conditioning: Conditioning,
    ) -> Float[Array, "b hm wm cm"]:
        """Return the network's features half-way through, in float32."""
        return self._call("mid_features", generator, latents, timesteps, conditioning)

    def _call(self, method, generator, latents, timesteps, conditioning):
        dtype = next(iter(generator.values())).dtype
        told = {
            name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for name, x in conditioning.items()
        }
        output = self.networks[self.generator_part].apply(
            generator, method, latents.astype(dtype), timesteps, **told
        )
        return output.astype(jnp.float32)

    def decode(self, vae: Params, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Return float32 images in [0, 1], clipped as the stock pipeline does."""
        return jnp.clip(self.decode_unclipped(vae, latents), 0.0, 1.0)

    def decode_unclipped(
        self, vae: Params, latents: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2 3"]:
        """Return images around [0, 1]: training needs the gradient of a pixel beyond it."""
        latents = latents / self.networks["vae"].config.scaling_factor + self.shift
        dtype = next(iter(vae.values())).dtype
        images = self.networks["vae"].apply(vae, "decode", latents.astype(dtype))
        return images.astype(jnp.float32) / 2 + 0.5

    @property
    def shift(self) -> float:
        """Return what is added to the unscaled latents."""
        factor = self.networks["vae"].config.shift_factor if self.uses_shift_factor else None
        return factor or 0.0
