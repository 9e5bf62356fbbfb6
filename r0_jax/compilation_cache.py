"""Keeps compiled programs on disk, so that the next start of a command takes seconds."""

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

from r0_jax import remote

# Operations of a program. The step of the embedded world has 36,000 and can be read; that of SDXL
# has 104,000 and cannot.
_MOST_ON_CPU = 50_000


def keep(folder: str = "") -> None:
    """Read and write compiled programs in `folder`, or in r0_jax's cache where that is ""."""
    jax.config.update("jax_compilation_cache_dir", folder or str(remote.cache()))


def compile_kept(lowered: Lowered) -> Compiled:
    """Compile a program, and keep it, unless reading it again would end the process.

    JAX reads a kept program of the CPU by recursion over its kernels. Where they are thousands, the
    2 MiB of stack of JAX's thread overflow, which is a segmentation fault.
    """
    if not (
        jax.default_backend() == "cpu"
        and jax.config.jax_enable_compilation_cache
        # Looked at last: the text of a large program is megabytes.
        and lowered.as_text().count(" = stablehlo.") > _MOST_ON_CPU
    ):
        return lowered.compile()
    try:
        _enable(False)
        return lowered.compile()
    finally:
        _enable(True)


def _enable(value: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", value)
    compilation_cache.reset_cache()  # which has looked at the setting once
