"""Rewards: images and prompts -> one differentiable score each."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import PICKLED
from r0_jax.rewards import aesthetic, clip_score, image_reward, plugin
from r0_jax.rewards.preprocess import RESIZES
from r0_jax.rewards.reward import Reward
from r0_jax.weights import convert

# `type` of a config entry -> how to load it.
TYPES: dict[str, Callable[[str, ConfigDict, str, bool], Reward]] = {
    "clip_score": clip_score.load,
    "hps_v2": clip_score.load_hps,
    "hps_v2_1": clip_score.load_hps,
    "pickscore": clip_score.load_pickscore,
    "chinese_clip": clip_score.load,
    "image_reward": image_reward.load,
    "aesthetic": aesthetic.load,
    "function": plugin.load,
}
# `type` -> fields without which it is nothing.
_NEEDED = {**dict.fromkeys(TYPES, ("path",)), "function": ("function",)}


def load(
    name: str, entry: ConfigDict | str | Path, dtype: str = "float32", text: bool = True
) -> Reward:
    """The reward that one entry of `config.rewards` describes; towers compute in `dtype`.

    In place of an entry a folder will do; then `name` is one of `TYPES` too, as in
    `load("hps_v2_1", "/path")`, or `load("function", "module:function")`. Without `text` no text
    tower is read or needs to be there: features of prompts were computed before.
    Raises InputError for an unknown type, for files that are missing or do not fit, and for a
    checkpoint that must be converted first.
    """
    if not isinstance(entry, ConfigDict):
        entry = ConfigDict(
            {
                "type": name,
                "path": str(entry),
                "head": "",
                "logit_scale": False,
                "function": str(entry),
                "resize": "bicubic",
            }
        )
    if entry.type not in TYPES:
        raise InputError(
            f"rewards.{name}.type = {entry.type!r} is unknown; known: {', '.join(TYPES)}"
        )
    if entry.resize not in RESIZES:
        raise InputError(
            f"rewards.{name}.resize = {entry.resize!r} is unknown; known: {', '.join(RESIZES)}"
        )
    for field in _NEEDED[entry.type]:
        if not entry[field]:
            raise InputError(
                f"rewards.{name}.{field} is not set: a reward of type {entry.type} needs it"
            )
    if entry.type != "function":
        _check_converted(name, entry)
    return TYPES[entry.type](name, entry, dtype, text)


def _check_converted(name: str, entry: ConfigDict) -> None:
    """InputError that gives the command, where an entry leads to nothing or to a file as it was
    published."""
    path, out = remote.local(entry.path), "--tokenizer=PATH --out=FOLDER"
    if not path.exists():
        raise InputError(
            f"rewards.{name}.path = {entry.path!r} is not there: give the folder of "
            f"its {entry.type} model, which python -m r0_jax.convert_reward makes of "
            "a file as it was published (docs/rewards.md)"
        )
    if path.is_file():
        field, file = "path", path
        said = "is a file: give a folder of transformers or open_clip, or"
    elif entry.type == "aesthetic" and Path(entry.head).suffix in PICKLED:
        field, file, said = "head", entry.head, "is a pickle, which is never read:"
    elif (found := convert.pickles(path)) and not any(
        any(path.glob(kept)) for kept in ("*.safetensors*", "config.json")
    ):
        field, file, said = "path", found[0], f"holds {found[0].name}, which is never read:"
    else:
        return
    if entry.type == "aesthetic":  # whose head goes into the folder of its CLIP
        out = f"--out={path if path.is_dir() else 'FOLDER'}"
    raise InputError(
        f"rewards.{name}.{field} = {entry[field]!r} {said} convert the published file "
        f"first, with python -m r0_jax.convert_reward --reward={entry.type} "
        f"--checkpoint={file} {out} (see its --help)"
    )
