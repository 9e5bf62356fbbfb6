"""JSON with a checksum of itself: a flipped bit may leave it JSON, with another number."""

import json
import zlib
from typing import Any


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with its checksum in the field "seal"."""
    return value | {"seal": _checksum(value)}


def loads(text: str) -> dict[str, Any]:
    """What was sealed, from its JSON; ValueError if that is broken or not what was written."""
    value = json.loads(text)
    if not isinstance(value, dict) or value.pop("seal", None) != _checksum(value):
        raise ValueError("it is not what was written (checksums differ)")
    return value


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
