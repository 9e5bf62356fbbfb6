"""Keeps compiled programs on disk, so that the next start of a command takes seconds."""

import jax

from r0_jax import remote


def keep(folder: str = "") -> None:
    """Read and write compiled programs in `folder`, or in r0_jax's cache where that is ""."""
    jax.config.update("jax_compilation_cache_dir", folder or str(remote.cache()))
