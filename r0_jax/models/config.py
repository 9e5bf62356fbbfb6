"""Published JSON configs -> frozen dataclasses; an unsupported field is refused by name."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from r0_jax.errors import InputError

Config = TypeVar("Config")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if it is missing or not a JSON object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is the folder complete?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not valid JSON ({e}): download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def parse(cls: type[Config], fields: Mapping[str, Any], *, only: Mapping[str, tuple] = {},
          unused: frozenset[str] = frozenset()) -> Config:
    """An instance of the dataclass `cls`, whose field names and defaults mirror the library's.

    Args:
      only: fields that change the network in ways not implemented here, with the values that do
        not ("field": (values that are fine, ...)).
      unused: fields without an effect on the network's output (training flags, metadata).
    Raises:
      InputError: a field has an unsupported value or is unknown; the message names it.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in fields.items():
        if name.startswith("_") or name in unused:
            continue
        if name in only:
            if _hashable(value) not in only[name]:
                raise InputError(
                    f"{cls.__name__}: {name} = {json.dumps(value)} is not supported "
                    f"(supported: {', '.join(json.dumps(v) for v in only[name])})")
            continue
        if name not in known:
            raise InputError(f"{cls.__name__}: the config field {name!r} = {json.dumps(value)} "
                             "is not supported")
        values[name] = _hashable(value)
    try:
        return cls(**values)
    except TypeError as e:
        raise InputError(f"{cls.__name__}: {e}") from None


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
