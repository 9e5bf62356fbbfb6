"""Running the entry points on miniatures, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import fast_xla
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Miniatures and compiled programs are kept here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def run(module, *arguments):
    return subprocess.run(
        command(module, *arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def command(module, *arguments):
    return [sys.executable, "-m", f"r0_jax.{module}", *map(str, arguments)]


def environment():
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": fast_xla.FLAGS,
        **fast_xla.KEEP,
    }
