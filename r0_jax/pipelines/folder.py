"""Open a diffusers folder: read and check all of it but the weights.

An error in the index, a config, a tokenizer or the scheduler shows before gigabytes are read.
"""

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax import nnx

from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.files import is_plain_name, naming, read_json
from r0_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from r0_jax.models.bert import BertConfig, BertModel
from r0_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from r0_jax.models.qwen3 import Qwen3Config, Qwen3Model
from r0_jax.models.t5 import T5Config, T5EncoderModel
from r0_jax.models.transformer_sd3 import SD3Transformer2DConfig, SD3Transformer2DModel
from r0_jax.models.transformer_z_image import ZImageTransformer2DConfig, ZImageTransformer2DModel
from r0_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from r0_jax.pipelines import tokenizers
from r0_jax.pipelines.tokenizers import Tokenizer
from r0_jax.weights import convert
from r0_jax.weights.network import Network, Params, stored_in

# Class of diffusers -> the family's name for people.
FAMILIES = {
    "StableDiffusionPipeline": "Stable Diffusion 1.x",
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "ZImagePipeline": "Z-Image",
}
Build = Callable[[dict[str, Any], nnx.Rngs], nnx.Module]


def _network(config: type, module: type) -> Build:
    return lambda fields, rngs: module(config.from_json(fields), rngs=rngs)


# Class in model_index.json -> (how to build the network from its config.json, stem of the weights).
NETWORKS: dict[str, tuple[Build, str]] = {
    "UNet2DConditionModel": (
        _network(UNet2DConditionConfig, UNet2DConditionModel),
        "diffusion_pytorch_model",
    ),
    "SD3Transformer2DModel": (
        _network(SD3Transformer2DConfig, SD3Transformer2DModel),
        "diffusion_pytorch_model",
    ),
    "ZImageTransformer2DModel": (
        _network(ZImageTransformer2DConfig, ZImageTransformer2DModel),
        "diffusion_pytorch_model",
    ),
    "AutoencoderKL": (_network(AutoencoderKLConfig, AutoencoderKL), "diffusion_pytorch_model"),
    "CLIPTextModel": (_network(CLIPTextConfig, CLIPTextModel), "model"),
    "CLIPTextModelWithProjection": (_network(CLIPTextConfig, CLIPTextModelWithProjection), "model"),
    "T5EncoderModel": (_network(T5Config, T5EncoderModel), "model"),
    "BertModel": (_network(BertConfig, BertModel), "model"),
    "Qwen3Model": (_network(Qwen3Config, Qwen3Model), "model"),
    "Qwen3ForCausalLM": (_network(Qwen3Config, Qwen3Model), "model"),  # whose head is its table
}
TEXT_PARTS = ("text_encoder", "tokenizer")  # prefixes of their names
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
BERT_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast")
T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
QWEN2_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """All of a folder but its weights.

    Attributes:
      index: model_index.json.
      fields: the config.json of each network.
      files: the weights of each network, known to be there.
      scheduler_config: as the stock pipeline builds it: of the index's class, whatever the
        scheduler's own file says.
    """

    path: Path
    index: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    files: dict[str, list[Path]]
    networks: dict[str, Network]
    tokenizers: dict[str, Tokenizer]
    scheduler_config: SchedulerConfig

    def load(self, dtype: str) -> dict[str, Params]:
        """Return the parameters of the networks in `files`, lazy ones.

        Raises:
          InputError: a key of a file is wrong; the message names it.
        """
        return {
            part: convert.open_params(files, self.networks[part], dtype)
            for part, files in self.files.items()
        }

    def check_equal(self, rows: Iterable[tuple[str, Any, str, Any]]) -> None:
        """Raise InputError unless the parts fit each other: rows (left, a, right, b), a == b."""
        for left, a, right, b in rows:
            if a != b:
                raise InputError(
                    f"{self.path}: the {left} is {a}, but the {right} is {b}: these "
                    "parts belong to different models"
                )

    def check_conditions(self, part: str, names: Iterable[str], told: str) -> None:
        """Raise InputError if the network takes an input that this family does not give.

        Args:
          names: fields of the network's config that must be null.
          told: what the network is given instead, for the message.
        """
        for field in names:
            if (value := getattr(self.networks[part].config, field)) is not None:
                raise InputError(
                    f"{self.path}/{part}/config.json: {field} = {json.dumps(value)} "
                    f"is not supported here: {told}"
                )

    def check_vocabulary(self) -> None:
        """Raise InputError unless every text encoder knows all tokens of its tokenizer."""
        for name, tokenizer in self.tokenizers.items():
            part = name.replace("tokenizer", "text_encoder")
            known, highest = (
                self.networks[part].config.vocab_size,
                max(tokenizer.get_vocab().values()),
            )
            if highest >= known:
                raise InputError(
                    f"{self.path}: the {name} has ids up to {highest}, the {part} "
                    f"knows {known} tokens: they belong to different models"
                )


def open_folder(
    path: Path,
    family: str,
    parts: Mapping[str, tuple[str, ...]],
    optional: tuple[str, ...] = (),
    overruled: Mapping[str, Any] = MappingProxyType({}),
    *,
    even_sigmas: bool = False,
    text: bool = True,
    images: bool = True,
) -> Folder:
    """Read all but the weights of a folder.

    Args:
      family: the class of diffusers that model_index.json must name.
      parts: networks and tokenizers, with the classes that each may have.
      optional: networks that may be missing, with their tokenizers. A warning says so where the
        index has them.
      overruled: fields of the scheduler's config that the stock pipeline sets itself.
      even_sigmas: as in `SchedulerConfig`.
      text, images: as for `families.load`.
    Raises:
      InputError: a part is missing, half downloaded or of another family; the message says which.
    """
    index = read_index(path)
    if index["_class_name"] != family:
        raise InputError(f"{path} is {describe(index['_class_name'])}, not {describe(family)}")
    kinds = {}
    for part, allowed in parts.items():
        if part.startswith(TEXT_PARTS) and not text:
            continue
        found = _class(path, part, index.get(part))
        if part in optional and (found is None or not (path / part).is_dir()):
            if found is not None:
                warnings.warn(f"{path / part} is missing: loading without it", stacklevel=3)
            continue
        if part.replace("tokenizer", "text_encoder") not in {*kinds, part}:
            continue  # the tokenizer of a missing encoder
        if found not in allowed:
            raise InputError(
                f"{path}/model_index.json {f'says {found} of' if found else 'lacks'} {part}: "
                f"{' or '.join(allowed[:2])} is expected"
            )
        kinds[part] = found
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler_config = SchedulerConfig.from_json(
        read_json(scheduler_file) | {"_class_name": _scheduler_class(path, index)} | overruled,
        f"{scheduler_file}: ",
        even_sigmas,
    )
    tokenizers_ = {
        part: tokenizers.load_tokenizer(path / part, kind)
        for part, kind in kinds.items()
        if kind in tokenizers.KINDS
    }
    kinds = {part: kind for part, kind in kinds.items() if kind in NETWORKS}
    fields = {part: _read_fields(path / part / "config.json") for part in kinds}
    files = {
        part: convert.find_files(path / part, NETWORKS[kind][1])
        for part, kind in kinds.items()
        if images or part.startswith(TEXT_PARTS)
    }
    networks = {}
    for part, kind in kinds.items():
        build = functools.partial(NETWORKS[kind][0], fields[part])
        stored = stored_in(files.get(part, ()))
        with naming(path / part / "config.json"):
            networks[part] = Network.abstract(build, stored)
    return Folder(path, index, fields, files, networks, tokenizers_, scheduler_config)


def read_index(path: Path) -> dict[str, Any]:
    """Return the folder's model_index.json.

    Raise InputError unless its family is supported and its parts have plain names, which are safe
    to use as the names of folders.
    """
    if not path.is_dir():
        raise InputError(
            f"{path} is not a folder: give the diffusers folder of a pretrained "
            "pipeline (the one that holds model_index.json)"
        )
    index = read_json(path / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{path} holds a {name}, which is not supported; supported: {', '.join(FAMILIES)}"
        )
    for part, entry in index.items():
        if not is_plain_name(part):
            raise InputError(
                f"{path}/model_index.json: {json.dumps(part)} is not the name of a folder: "
                "download it again"
            )
        if isinstance(entry, list):
            _class(path, part, entry)
    return index


def describe(family: str) -> str:
    """Return a family for people: "SDXL (StableDiffusionXLPipeline)"."""
    return f"{FAMILIES[family]} ({family})"


def _class(path: Path, part: str, entry: Any) -> str | None:
    """Return the class of a part in model_index.json; None where the index has none."""
    match entry:
        case None | [None, _]:
            return None
        case [str(), str(name)]:
            return name
    raise InputError(
        f"{path}/model_index.json: {part} is {json.dumps(entry)}: its library and "
        'class are expected, as in ["diffusers", "DDIMScheduler"]'
    )


def _scheduler_class(path: Path, index: dict[str, Any]) -> str:
    entry = index.get("scheduler")
    if (name := _class(path, "scheduler", entry)) is None:
        raise InputError(
            f"{path}/model_index.json: scheduler is {json.dumps(entry)}: a pipeline "
            "without one does not say what noise it was trained on"
        )
    return name


def _read_fields(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    mended = mend_sample_size(fields)
    if mended != fields:
        warnings.warn(
            f"{path} is of an old diffusers and says sample_size "
            f"{fields['sample_size']}: 64 is used, as diffusers does",
            stacklevel=4,
        )
    return mended


def mend_sample_size(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a UNet's config.json with the sample_size of its training.

    Files of diffusers before 0.9 have another one, which stock pipelines overrule.
    """
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("_diffusers_version")))
    size = fields.get("sample_size")
    if (
        fields.get("_class_name") == "UNet2DConditionModel"
        and version
        and (int(version[1]), int(version[2])) < (0, 9)
        and type(size) is int
        and size < 64
    ):
        return fields | {"sample_size": 64}
    return fields
