"""JSON with a checksum of itself: with a flipped bit it may still be JSON, of another number."""

import json
import zlib
from typing import Any


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` with its checksum in the field "seal"."""
    return value | {"seal": _checksum(value)}


def loads(text: str) -> dict[str, Any]:
    """Return what was sealed, from its JSON; raise ValueError if it is broken or was changed."""
    value = json.loads(text)
    if not isinstance(value, dict) or value.pop("seal", None) != _checksum(value):
        raise ValueError("it is not what was written (checksums differ)")
    return value


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
