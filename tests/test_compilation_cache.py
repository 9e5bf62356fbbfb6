"""Compiled programs of a command stay on disk, unless they are too large to be read again."""

import os

import forks
import jax
import jax.numpy as jnp
import pytest
import tiny

from r0_jax import compilation_cache, config

EVERY = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


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


@pytest.fixture
def folder(tmp_path):
    """A folder that programs are kept in, of whatever size and compile time."""
    before = {name: getattr(jax.config, name) for name in (*EVERY, "jax_compilation_cache_dir")}
    for name, value in EVERY.items():
        jax.config.update(name, value)
    compilation_cache.keep(str(tmp_path))
    compilation_cache.compilation_cache.reset_cache()  # another test's folder
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.compilation_cache.reset_cache()


def kept(folder, name):
    return [path.name for path in folder.glob(f"jit_{name}-*")]


def test_a_program_too_large_to_be_read_again_is_not_kept(folder, monkeypatch):
    def large(x):
        return jnp.sin(x) + jnp.cos(x) * jnp.tanh(x)

    def small(x):
        return jnp.sin(x)

    monkeypatch.setattr(compilation_cache, "_MOST_ON_CPU", 3)
    for function in (large, small):
        compiled = compilation_cache.compile_kept(jax.jit(function).lower(1.0))
        assert compiled(1.0) == pytest.approx(function(1.0))
    assert kept(folder, "small") and not kept(folder, "large")
    assert jax.config.jax_enable_compilation_cache
