"""Too little memory and a backend that does not start are errors of the user, in one line."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from r0_jax import errors, machine
from r0_jax.workdir import checkpoint


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1, 2)"), "7.4 GiB"),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."
            ),
            "16.0 GiB",
        ),
        (
            RuntimeError(
                "[enforce fail] not enough memory: you tried to allocate 4000000000000 bytes."
            ),
            "3725.3 GiB",
        ),
        (MemoryError(), None),
    ],
)
def test_out_of_memory_is_one_line_with_what_was_asked_for(error, asked):
    status, line = errors.explain(error)
    assert status == errors.USER_ERROR and line.startswith("out of memory while working")
    assert (f"{asked} were asked for" in line) == (asked is not None) and "are free" in line


def test_the_phase_and_its_fields_come_from_where_the_error_was_raised():
    def fail(module, name):
        program = compile("def fail(): raise MemoryError", str(machine._PACKAGE / module), "exec")
        found = {}
        exec(program, found)
        with pytest.raises(MemoryError) as raised:
            found["fail"]()
        return errors.explain(raised.value)[1]

    assert "while drawing images" in fail("sample.py", "") and "--batch_size" in fail(
        "sample.py", ""
    )
    assert "while training" in fail("training/loop.py", "")
    assert "config.device_batch" in fail("training/loop.py", "")
    assert "while reading weights" in fail("weights/lazy.py", "")


@pytest.mark.parametrize("platform", ["rocm", "moon"])
def test_a_backend_that_is_not_there_is_one_line(platform):
    """JAX raises an AssertionError without a word for those that it knows."""
    program = (
        "import jax\nfrom r0_jax import errors\n"
        "try:\n    jax.devices()\nexcept BaseException as error:\n    print(errors.explain(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": platform},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("(2, "), done.stderr
    assert "JAX cannot start the device" in done.stdout and platform in done.stdout


def test_an_error_that_hides_the_machines_is_still_the_machines():
    try:
        try:
            np.empty(2**60, np.uint8)
        except MemoryError as error:
            raise ValueError("cannot read it") from error
    except ValueError as error:
        assert "out of memory" in errors.explain(error)[1]
    assert errors.explain(ValueError("cannot read it")) == (errors.BUG, None)
    assert errors.explain(KeyError("a memory")) == (errors.BUG, None)


def test_a_backend_that_does_not_start_is_no_damage(tmp_path):
    error = RuntimeError("Unable to initialize backend 'cuda': no device\nset JAX_PLATFORMS=''")
    status, line = errors.explain(error)
    assert status == errors.USER_ERROR and "'cuda'" in line and "JAX_PLATFORMS" in line
    assert checkpoint._unreadable(tmp_path, error) is error
    assert isinstance(checkpoint._unreadable(tmp_path, ValueError("x")), checkpoint.DamagedError)
