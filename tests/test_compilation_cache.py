"""Compiled programs of a command stay on disk, where the user's cache is."""

import os

import forks
import jax
import tiny

from r0_jax import compilation_cache, config


def test_the_next_call_compiles_nothing_anew(tmp_path):
    tiny.stable_diffusion(tmp_path / "sd")
    (tmp_path / "p.txt").write_text("a red circle\n", encoding="utf-8")
    flags = [f"--pipeline={tmp_path / 'sd'}", f"--prompts={tmp_path / 'p.txt'}", "--batch_size=1"]
    flags.append("--num_inference_steps=2")
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("first", "second"):
        call = ("r0_jax.sample", [*flags, f"--out={tmp_path / name}"])
        [(status, _, err)] = forks.run([call], env=env)
        assert (status, err) == (0, "")
        kept = {path.name for path in (tmp_path / "cache" / "r0_jax").glob("jit_*-cache")}
        assert kept
        if name == "first":
            before = kept
    assert kept == before
    images = [(tmp_path / name / "00000.png").read_bytes() for name in ("first", "second")]
    assert images[0] == images[1]


def test_the_configs_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        compilation_cache.keep(config.get_config().compilation_cache)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "r0_jax")
        compilation_cache.keep("/mine")
        assert jax.config.jax_compilation_cache_dir == "/mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
