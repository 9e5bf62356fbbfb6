"""A run knows the weights again that it began with."""

import json

import numpy as np
import pytest
import tiny
from runs import write_run
from safetensors.numpy import load_file, save_file

from r0_jax.errors import InputError
from r0_jax.pipelines import families
from r0_jax.workdir import origin
from r0_jax.workdir.run import open_run
from r0_jax.workdir.workdir import LocalWorkdir

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def world(tmp_path):
    tiny.stable_diffusion(tmp_path / "base")
    write_run(tmp_path / "run", tmp_path / "base", 2, {10: 0.5})
    return tmp_path


def read(workdir, pretrained=None):
    assert open_run(LocalWorkdir(workdir), pretrained).pipeline


def change(base, key="", by=0.1, dtype=np.float32):
    tensors = load_file(base / WEIGHTS)
    changed = {k: (v + by if k.startswith(key) else v).astype(dtype) for k, v in tensors.items()}
    save_file(changed, base / WEIGHTS)
    return len(tensors)


def test_weights_that_changed_are_an_error_for_readers(world):
    origin.keep(world / "run", families.load(world / "base"))
    facts = json.loads((world / "run" / "pretrained.json").read_text("utf-8"))
    assert facts["part"] == "unet" and facts["folder"] == str(world / "base")
    read(world / "run")
    change(world / "base")
    with pytest.raises(
        InputError,
        match=r"base does not hold the weights .*run was trained on: "
        r"its unet has changed; .*--pretrained=DIR, or delete .*pretrained\.json",
    ):
        read(world / "run")
    tiny.stable_diffusion(world / "moved")
    read(world / "run", world / "moved")


def test_one_tensor_that_changed_is_enough(world):
    before = families.load(world / "base")
    origin.keep(world / "run", before)
    change(world / "base", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 1.0)
    with pytest.raises(InputError, match="bring it back, or delete"):
        origin.check(world / "run", families.load(world / "base"), "bring it back")


def test_the_same_weights_are_known_in_any_dtype(world):
    change(world / "base", by=0, dtype=np.float16)
    origin.keep(world / "run", families.load(world / "base", "bfloat16"))
    change(world / "base", by=0, dtype=np.float32)  # the same numbers
    origin.check(world / "run", families.load(world / "base", "float32"), "")


def test_a_run_without_a_fingerprint_is_read_as_before(world):
    assert not origin.is_kept(world / "run")
    change(world / "base")
    read(world / "run")
