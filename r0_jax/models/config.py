"""Published JSON configs as frozen dataclasses; an error names a field that is not supported."""

import dataclasses
import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from r0_jax.errors import InputError
from r0_jax.models.activations import ACTIVATIONS

Config = TypeVar("Config")

# Largest values that are read: far above those of all networks, and small enough to build them.
_MOST_NUMBER = 2**24
_MOST_LAYERS = 10_000
_MOST_SIDE = 8192  # of latents, or of a tower's images

# Types, as JSON has them.
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_KINDS |= {type(None): "null", tuple: "a list", dict: "an object"}

# What EMAModel of diffusers adds to the config.json of any network: how the average was made.
EMA_FIELDS = frozenset(
    {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


def parse(
    cls: type[Config],
    fields: Mapping[str, Any],
    *,
    only: Mapping[str, tuple] = {},
    unused: frozenset[str] = frozenset(),
) -> Config:
    """Return an instance of the dataclass `cls`, which mirrors the library's names and defaults.

    Args:
      only: fields that change the network, with the only values implemented here
        ("field": (valid values, ...)). Those that `cls` does not have are checked and dropped.
      unused: fields without an effect on the network's output (training flags, metadata).
    Raises:
      InputError: a field has an unsupported value or is unknown; the message names it.
    """
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    values = {}
    for name, value in fields.items():
        if name.startswith("_") or name in unused:
            continue
        if name in only:
            if _hashable(value) not in only[name]:
                raise InputError(
                    f"{cls.__name__}: {name} = {json.dumps(value)} is not supported "
                    f"(supported: {', '.join(json.dumps(v) for v in only[name])})"
                )
            if name not in known:
                continue
        if name not in known:
            raise InputError(
                f"{cls.__name__}: the config field {name!r} = {json.dumps(value)} is not supported"
            )
        values[name] = _hashable(value)
        _check_size(cls, name, values[name])
        if not _is_of_type(values[name], known[name]):
            raise InputError(
                f"{cls.__name__}: {name} = {json.dumps(value)} is not supported: "
                f"{_named(known[name])} is expected"
            )
    try:
        return cls(**values)
    except TypeError as e:
        raise InputError(f"{cls.__name__}: {e}") from None


def _check_size(cls: type, name: str, value: Any) -> None:
    """Raise InputError for a number that no network has, before anything is allocated by it."""
    if isinstance(value, tuple):
        for one in value:
            _check_size(cls, name, one)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    most = 10**12 if isinstance(value, float) else _MOST_NUMBER  # no size is a float
    least = -most
    if "eps" in name.split("_"):
        least, most = 0, 1
    elif name == "layer_norm_epsilon":
        least, most = 0, 1
    elif "layers" in name.split("_") or name.endswith("_blocks"):
        most = _MOST_LAYERS
    elif name in ("sample_size", "pos_embed_max_size", "image_size"):
        most = _MOST_SIDE
    if not (least <= value <= most and math.isfinite(value)):  # NaN is not
        said = "NaN" if value != value else f"{value:.6g}" if abs(value) < 1e300 else "too large"
        expected = f"at most {most}" if value > most else f"a number from {least} to {most}"
        raise InputError(
            f"{cls.__name__}: {name} = {said} is not supported: {expected} is expected"
        )


def parse_transformers(
    cls: type[Config],
    fields: Mapping[str, Any],
    *,
    only: Mapping[str, tuple] = {},
    ids: tuple[str, ...] = (),
) -> Config:
    """Parse a file of transformers; every whole number but `ids` counts something.

    Such a file holds dozens of defaults for generation and training. So a field that the network
    does not have is not an error here.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    config = parse(cls, {k: v for k, v in fields.items() if k in types or k in only}, only=only)
    check_least(
        config, 1, *(name for name, kind in types.items() if kind is int and name not in ids)
    )
    return config


def check_layers(config: Any) -> None:
    """Raise InputError unless the heads divide the width and the activation is known."""
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{type(config).__name__}: num_attention_heads = "
            f"{config.num_attention_heads} does not divide hidden_size = "
            f"{config.hidden_size}"
        )
    check_activation(config)


def check_activation(config: Any) -> None:
    """Raise InputError unless the activation is known."""
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(
            f"{type(config).__name__}: hidden_act = {config.hidden_act!r} is not "
            f"supported (supported: {', '.join(ACTIVATIONS)})"
        )


def check_least(config: Any, least: int, *names: str) -> None:
    """Raise InputError unless these whole numbers, or tuples of them, are at least `least`."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values or min(values) < least:
            raise InputError(
                f"{type(config).__name__}: {name} = {json.dumps(value)} is not "
                f"supported: at least {least} is expected"
            )


def check_groups(config: Any) -> None:
    """Raise InputError unless the groups of the norms divide the channels of every level."""
    check_least(config, 1, "block_out_channels", "norm_num_groups")
    groups, widths = config.norm_num_groups, config.block_out_channels
    if any(width % groups for width in widths):
        raise InputError(
            f"{type(config).__name__}: norm_num_groups = {groups} does not divide "
            f"block_out_channels = {list(widths)}"
        )


def check_scaling(config: Any) -> None:
    """Raise InputError unless an autoencoder's scale and shift of latents are valid."""
    for name, fine, expected in (  # NaN is not fine
        ("scaling_factor", 1e-6 <= config.scaling_factor <= 1e6, "a number above 0"),
        ("shift_factor", abs(config.shift_factor or 0) <= 1e6, "a number"),
    ):
        if not fine:
            raise InputError(
                f"{type(config).__name__}: {name} = "
                f"{json.dumps(getattr(config, name))} is not supported: {expected}, "
                "and no more than a million, is expected"
            )


def _named(annotation: Any) -> str:
    """Return the name that a file's author knows: "a whole number", "a list", "text or null"."""
    kinds = get_args(annotation)
    if get_origin(annotation) is UnionType:
        return " or ".join(map(_named, kinds))
    if get_origin(annotation) is tuple:
        inside = dict.fromkeys(_named(kind) for kind in kinds if kind is not ...)
        return f"a list ({' or '.join(inside)})"
    return _KINDS.get(annotation) or annotation.__name__


def _is_of_type(value: Any, annotation: Any) -> bool:
    kinds = get_args(annotation)
    if get_origin(annotation) is UnionType:
        return any(_is_of_type(value, kind) for kind in kinds)
    if get_origin(annotation) is tuple:
        kinds = kinds[:1] * len(value) if kinds[-1] is ... and isinstance(value, tuple) else kinds
        return (
            isinstance(value, tuple)
            and len(value) == len(kinds)
            and all(map(_is_of_type, value, kinds))
        )
    if isinstance(value, bool):  # which is an int to Python
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
