"""Memory of the host that nobody uses any more."""

import ctypes
import sys


def give_back() -> None:
    """Returns to the system what was freed. glibc keeps it, spread over its arenas: compiling the
    embedded world's train step leaves more than 1 GB that way. Elsewhere nothing happens."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
