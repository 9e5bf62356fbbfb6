"""Gives freed memory of the host back to the system."""

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, which glibc keeps, spread over its arenas.

    Compiling the embedded world's train step leaves more than 1 GB that way. Without glibc this
    does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
