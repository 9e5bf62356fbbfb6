"""Loads both towers of a CLIP from a folder of transformers, open_clip or cn_clip."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import naming, read_json
from r0_jax.models.bert import BertConfig
from r0_jax.models.chinese_clip import CNCLIP, ChineseCLIPConfig, ChineseCLIPModel, CNCLIPConfig
from r0_jax.models.clip import CLIPConfig, CLIPModel
from r0_jax.models.open_clip import OpenCLIP, OpenCLIPConfig
from r0_jax.rewards import preprocess, prompt_text
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.rewards.prompt_text import Tokenize
from r0_jax.weights import convert, lazy
from r0_jax.weights.network import Network, Params, stored_in

_TEXT_BATCH = 256  # prompts encoded at once; fewer are padded to a power of 2, to compile rarely
_CHINESE_LENGTH = 52  # tokens that cn_clip trains on; the network has 512 positions

OPEN_CLIP_CONFIG = "open_clip_config.json"


class Tower(NamedTuple):
    """A CLIP of any family.

    Attributes:
      network: the network, with the methods `image_features` and `text_features`.
      sight: the part of the network that `image_features` needs.
      params: `Lazy` weights; place them on the devices before use.
      tokenize: prompts -> token ids; None without the text tower.
      prepare: images in [0, 1] -> input of `image_features`.
      width: width of the shared space.
      text_parts: names of the parts that only `text_features` needs.
      dtype: dtype of the computation; the logit scale, a factor of every score, stays float32.
    """

    network: Network
    sight: Network
    params: Params
    tokenize: Tokenize | None
    prepare: Preprocess
    width: int
    text_parts: tuple[str, ...]
    dtype: str

    @property
    def grid(self) -> int:
        """Patches per side of the vision transformer."""
        patch = next(
            value.shape[0]
            for name, value in self.params.items()
            if name.endswith(("patch_embedding.kernel", "visual.conv1.kernel"))
        )
        return self.prepare.size // patch

    def text_encoder(self) -> Callable[[Params, Sequence[str]], Float[np.ndarray, "n d"]]:
        """Return a function (params, prompts) -> normalized text features, float32 [N, D].

        It places params that are not yet on a device, and frees them at the end.
        """

        @jax.jit
        def encode(params: Params, input_ids: jax.Array) -> jax.Array:
            return normalize(self.network.apply(params, "text_features", input_ids))

        def text_features(params: Params, prompts: Sequence[str]) -> Float[np.ndarray, "n d"]:
            params, ids, rows = lazy.place(params), self.tokenize(prompts).ids, []
            size = min(_TEXT_BATCH, 1 << (len(ids) - 1).bit_length())
            for start in range(0, len(ids), size):
                chunk = ids[start : start + size]
                padded = np.pad(chunk, ((0, size - len(chunk)), (0, 0)), mode="edge")
                rows.append(np.asarray(encode(params, padded))[: len(chunk)])
            return np.concatenate(rows)

        return text_features


def load(folder: str | Path, dtype: str = "float32", text: bool = True) -> Tower:
    """Load a transformers folder of a CLIPModel or ChineseCLIPModel, or an open_clip folder.

    With `text=False` the text tower and its tokenizer are not read and may be missing.
    Raise InputError for a folder that is missing, incomplete, or of another kind.
    """
    folder = remote.local(folder)
    if not (folder / "config.json").is_file() and (folder / OPEN_CLIP_CONFIG).is_file():
        with naming(folder):
            return _load_open_clip(folder, dtype, text)
    fields = read_json(folder / "config.json")
    # Old folders do not give a type.
    kind = fields.get("model_type", "clip")
    if kind not in _TRANSFORMERS:
        raise InputError(
            f"{folder / 'config.json'}: model_type = {kind!r} is not a CLIP "
            f"(known: {', '.join(_TRANSFORMERS)})"
        )
    with naming(folder):
        return _TRANSFORMERS[kind](folder, fields, dtype, text)


def normalize(features: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Scale each row to unit length, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def _load_clip(folder: Path, fields: dict[str, Any], dtype: str, text: bool) -> Tower:
    with naming(folder / "config.json"):
        config = CLIPConfig.from_json(fields)
    tokenize = (
        prompt_text.clip(
            folder, config.text_config.max_position_embeddings, config.text_config.vocab_size
        )
        if text
        else None
    )
    return _from_transformers(folder, CLIPModel, config, tokenize, dtype)


def _load_chinese_clip(folder: Path, fields: dict[str, Any], dtype: str, text: bool) -> Tower:
    with naming(folder / "config.json"):
        config = ChineseCLIPConfig.from_json(fields)
    tokenize = _chinese(prompt_text.wordpiece, folder, config.text_config) if text else None
    return _from_transformers(folder, ChineseCLIPModel, config, tokenize, dtype)


def _load_cn_clip(folder: Path, fields: dict[str, Any], dtype: str, text: bool) -> Tower:
    with naming(folder / "config.json"):
        config = CNCLIPConfig.from_json(fields)
    return _build(
        CNCLIP,
        config,
        convert.find_files(folder, "model"),
        dtype,
        _chinese(prompt_text.cn_clip, folder, config.text) if text else None,
        Preprocess(config.vision.image_size, "squash"),
        config.embed_dim,
    )


def _chinese(
    tokenizer: Callable[[Path, int, int], Tokenize], folder: Path, text: BertConfig
) -> Tokenize:
    return tokenizer(folder, min(_CHINESE_LENGTH, text.max_position_embeddings), text.vocab_size)


# By `model_type` of config.json. cn_clip's own files have no type; the converter adds it.
_TRANSFORMERS = {"clip": _load_clip, "chinese_clip": _load_chinese_clip, "cn_clip": _load_cn_clip}


def _from_transformers(
    folder: Path,
    module: type[nnx.Module],
    config: CLIPConfig | ChineseCLIPConfig,
    tokenize: Tokenize | None,
    dtype: str,
) -> Tower:
    prepare = _processor(folder, config.vision_config.image_size)
    return _build(
        module,
        config,
        convert.find_files(folder, "model"),
        dtype,
        tokenize,
        prepare,
        config.projection_dim,
    )


def _processor(folder: Path, image_size: int) -> Preprocess:
    """Read transformers' processor_config.json (from 5.0 on), else preprocessor_config.json."""
    if (path := folder / "processor_config.json").is_file():
        fields = read_json(path).get("image_processor")
        if isinstance(fields, dict):
            return preprocess.from_json(fields, image_size, f"{path.name}: image_processor")
    path = folder / "preprocessor_config.json"
    return preprocess.from_json(read_json(path), image_size, path.name)


def _build(
    module: type[nnx.Module],
    config: Any,
    files: list[Path],
    dtype: str,
    tokenize: Tokenize | None,
    prepare: Preprocess,
    width: int,
) -> Tower:
    def seeing(rngs: nnx.Rngs) -> nnx.Module:
        built = module(config, rngs=rngs)
        for part in module.text_parts:
            delattr(built, part)
        return built

    stored = stored_in(files)
    sight = Network.abstract(seeing, stored)
    network = sight
    if tokenize:
        network = Network.abstract(lambda rngs: module(config, rngs=rngs), stored)
    params = convert.open_params(files, network, "float32", () if tokenize else module.text_parts)
    params = {
        name: value if name == "logit_scale" else value.astype(convert.DTYPES[dtype])
        for name, value in params.items()
    }
    return Tower(network, sight, params, tokenize, prepare, width, module.text_parts, dtype)


def _load_open_clip(folder: Path, dtype: str, text: bool) -> Tower:
    fields = read_json(folder / OPEN_CLIP_CONFIG)
    if not isinstance(fields.get("model_cfg"), dict):
        raise InputError(f"{folder / OPEN_CLIP_CONFIG} has no model_cfg")
    with naming(folder / OPEN_CLIP_CONFIG):
        config = OpenCLIPConfig.from_json(fields["model_cfg"])
    tokenize = (
        prompt_text.open_clip(folder, config.text_cfg.context_length, config.text_cfg.vocab_size)
        if text
        else None
    )
    stem = "open_clip_model" if any(folder.glob("open_clip_model.*")) else "model"
    if not isinstance(prepared := fields.get("preprocess_cfg") or {}, dict):
        raise InputError(
            f"{folder / OPEN_CLIP_CONFIG}: preprocess_cfg = {prepared!r} is not an object of fields"
        )
    prepare = preprocess.from_open_clip(prepared, config.vision_cfg.image_size)
    return _build(
        OpenCLIP,
        config,
        convert.find_files(folder, stem),
        dtype,
        tokenize,
        prepare,
        config.embed_dim,
    )
