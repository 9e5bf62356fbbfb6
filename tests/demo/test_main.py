"""The command, where what it needs is not there."""

from importlib import metadata

import pytest

from r0_jax.demo import __main__ as demo
from r0_jax.errors import InputError


def test_without_gradio_it_says_what_to_install(monkeypatch, tmp_path):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    (tmp_path / "gradio").mkdir()  # which Python would import
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo.metadata, "version", version)
    with pytest.raises(InputError, match=r"pip install 'r0_jax\[demo\]'"):
        demo.main([])
