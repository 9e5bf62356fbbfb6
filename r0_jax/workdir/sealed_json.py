"""JSON with a checksum of itself: with a flipped bit it may still be JSON, of another number."""

import json
import zlib
from collections.abc import Mapping

from r0_jax import files
from r0_jax.files import Json


def seal(value: Mapping[str, object]) -> Json:
    """Return `value` with its checksum in the field "seal"."""
    return {**value, "seal": _checksum(value)}


def loads(text: str) -> Json:
    """Return what was sealed, from its JSON; raise ValueError if it is broken or was changed."""
    value = files.loads(text)
    if not isinstance(value, dict) or value.pop("seal", None) != _checksum(value):
        raise ValueError("it is not what was written (checksums differ)")
    return value


def loads_any(text: str) -> Json:
    """Return what `loads` does, also of JSON that was never sealed, such as that of old runs."""
    value = files.loads(text)
    return loads(text) if not isinstance(value, dict) or "seal" in value else value


def _checksum(value: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
