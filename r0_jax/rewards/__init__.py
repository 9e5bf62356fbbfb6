"""Rewards: map images and prompts to one differentiable score per image."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.config import reward_entry
from r0_jax.errors import InputError
from r0_jax.files import A_PICKLE, is_pickle, pickles
from r0_jax.rewards import aesthetic, clip_score, hps_v3, image_reward, plugin, vlm_yes_no
from r0_jax.rewards.preprocess import RESIZES
from r0_jax.rewards.reward import Reward

# `type` of a config entry -> its loader.
TYPES: dict[str, Callable[[str, ConfigDict, str, bool], Reward]] = {
    "clip_score": clip_score.load,
    "hps_v2": clip_score.load_hps,
    "hps_v2_1": clip_score.load_hps,
    "pickscore": clip_score.load_pickscore,
    "chinese_clip": clip_score.load,
    "image_reward": image_reward.load,
    "cycle_reward": image_reward.load_cycle_reward,
    "hps_v3": hps_v3.load,
    "vlm_yes_no": vlm_yes_no.load,
    "aesthetic": aesthetic.load,
    "function": plugin.load,
}
# `type` -> fields that must be set.
_NEEDED = {**dict.fromkeys(TYPES, ("path",)), "function": ("function",)}


def load(
    name: str, entry: ConfigDict | str | Path, dtype: str = "float32", text: bool = True
) -> Reward:
    """Load the reward that one entry of `config.rewards` describes; towers compute in `dtype`.

    `entry` may also be a folder. Then `name` is one of `TYPES`, as in
    `load("hps_v2_1", "/path")` or `load("function", "module:function")`. With `text=False` the
    text tower may be missing: use this when prompt features were computed before.

    Raise InputError for an unknown type, for missing or wrong files, and for a checkpoint that
    must be converted first.
    """
    if not isinstance(entry, ConfigDict):
        entry = reward_entry(name, path=str(entry), function=str(entry))
    entry = reward_entry(**entry.to_dict())  # the config of an old run lacks newer fields
    if entry.type not in TYPES:
        raise InputError(
            f"rewards.{name}.type = {entry.type!r} is unknown; known: {', '.join(TYPES)}"
        )
    if entry.resize not in RESIZES:
        raise InputError(
            f"rewards.{name}.resize = {entry.resize!r} is unknown; known: {', '.join(RESIZES)}"
        )
    if entry.size < 28 or entry.size % 28:
        raise InputError(
            f"rewards.{name}.size = {entry.size} is not a multiple of 28, the side of a token"
        )
    if entry.tokens < 1:
        raise InputError(f"rewards.{name}.tokens = {entry.tokens} must be at least 1")
    for field in _NEEDED[entry.type]:
        if not entry[field]:
            raise InputError(
                f"rewards.{name}.{field} is not set: a reward of type {entry.type} needs it"
            )
    if entry.type != "function":
        _check_converted(name, entry)
    loaded = TYPES[entry.type](name, entry, dtype, text)
    return dataclasses.replace(loaded, reads=entry.reads)


def _check_converted(name: str, entry: ConfigDict) -> None:
    """Check that an entry names a folder that is read; else raise InputError with the command."""
    path, out = remote.local(entry.path), "--tokenizer=PATH --out=FOLDER"
    as_published = entry.type == "vlm_yes_no"
    if not path.exists():
        made = (
            "; python -m r0_jax.convert_reward makes it from the published file (docs/rewards.md)"
        )
        raise InputError(
            f"rewards.{name}.path = {entry.path!r} does not exist: give the folder of "
            f"its {entry.type} model{'' if as_published else made}"
        )
    if as_published:
        if path.is_file():
            raise InputError(
                f"rewards.{name}.path = {entry.path!r} is a file: give the transformers folder of "
                "a Qwen2-VL"
            )
        return
    if path.is_file():
        field, file = "path", path
        said = "is a file: give a transformers or open_clip folder, or"
    elif entry.type == "aesthetic" and is_pickle(entry.head):
        field, file, said = "head", entry.head, f"is {A_PICKLE}:"
    elif (found := pickles(path)) and not any(
        any(path.glob(kept)) for kept in ("*.safetensors*", "config.json")
    ):
        field, file, said = "path", found[0], f"holds {found[0].name}, which is never read:"
    else:
        return
    if entry.type == "aesthetic":  # the head belongs in the folder of its CLIP
        out = f"--out={path if path.is_dir() else 'FOLDER'}"
    raise InputError(
        f"rewards.{name}.{field} = {entry[field]!r} {said} convert the published file "
        f"first, with python -m r0_jax.convert_reward --reward={entry.type} "
        f"--checkpoint={file} {out} (see its --help)"
    )
