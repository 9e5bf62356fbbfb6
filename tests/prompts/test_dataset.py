"""Batches of a tfds dataset, which depend only on (seed, step)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tfds_prompts

from r0_jax.errors import InputError
from r0_jax.prompts import dataset, files
from r0_jax.prompts.order import Draws

EXAMPLES = 23  # prime: no batch size below divides it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared dataset with every kind of column the trainer stores."""
    folder = tmp_path_factory.mktemp("data") / "prompts"
    tfds_prompts.write(columns(), folder)
    return folder


def columns() -> dict[str, np.ndarray | list[str]]:
    rng = np.random.default_rng(0)
    return {
        "prompt": [f"提示 {i % 20}" for i in range(EXAMPLES)],
        "input_ids": np.arange(EXAMPLES * 77, dtype=np.int32).reshape(EXAMPLES, 77),
        "clip": rng.normal(size=(EXAMPLES, 8)).astype(np.float32),
        "embeds": rng.normal(size=(EXAMPLES, 3, 4)).astype("bfloat16"),
        "index": np.arange(EXAMPLES, dtype=np.int32),
    }


def take(folder, count, batch_size, seed, step=0, **part) -> list[dict[str, np.ndarray]]:
    draws = Draws(batch_size, seed, range(step, step + count))
    return list(dataset.load(folder, draws, **part))


def indices(folder: Path, count: int, **kwargs) -> np.ndarray:
    return np.concatenate([batch["index"] for batch in take(folder, count, **kwargs)])


def test_every_value_and_dtype(folder):
    written = columns()
    [batch] = take(folder, 1, batch_size=EXAMPLES, seed=0)
    order = batch["index"]
    assert set(batch) == set(written)
    assert batch["prompt"].tolist() == [written["prompt"][i] for i in order]
    for name in ("input_ids", "clip", "embeds", "index"):
        assert batch[name].dtype == written[name].dtype, name
        np.testing.assert_array_equal(batch[name], written[name][order])


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 1000)])
def test_damaged_folder(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "copy")
    [records] = (tmp_path / "copy").glob("*array_record*")
    damage(records)
    with pytest.raises(InputError, match=r"copy cannot be read: "):
        dataset.load(tmp_path / "copy", Draws(2, 0))
    with pytest.raises(InputError, match=r"copy cannot be read: "):
        files.read_prompts(tmp_path / "copy")


# --- loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_epoch_has_every_example_once(folder, batch_size):
    found = indices(folder, 3 * EXAMPLES, batch_size=batch_size, seed=1)
    epochs = found[: 3 * EXAMPLES].reshape(3, EXAMPLES)
    assert [sorted(epoch) for epoch in epochs.tolist()] == 3 * [list(range(EXAMPLES))]
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3  # each in another order
    assert tuple(epochs[0]) != tuple(range(EXAMPLES))


def test_order_depends_on_the_seed_alone(folder):
    first, again = (indices(folder, 5, batch_size=6, seed=3) for _ in range(2))
    other = indices(folder, 5, batch_size=6, seed=4)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("step", [0, 1, 5, 100])
def test_starting_at_a_step_equals_skipping_to_it(folder, step):
    skipped = indices(folder, step + 3, batch_size=6, seed=3)[step * 6 :]
    np.testing.assert_array_equal(indices(folder, 3, batch_size=6, seed=3, step=step), skipped)


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_processes_hold_consecutive_parts_of_the_global_batch(folder, process_count):
    whole = take(folder, 6, batch_size=12, seed=3, step=2)
    parts = [
        take(folder, 6, batch_size=12, seed=3, step=2, parts=[i], of=process_count)
        for i in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_process_may_hold_parts_that_are_not_neighbours(folder):
    whole = take(folder, 3, batch_size=12, seed=3, step=2)
    mine = take(folder, 3, batch_size=12, seed=3, step=2, parts=[0, 2], of=4)
    for step, batch in enumerate(mine):
        rows = [0, 1, 2, 6, 7, 8]
        assert all((batch[name] == whole[step][name][rows]).all() for name in batch)


def test_uneven_split_among_processes_is_an_error(folder):
    with pytest.raises(InputError, match="batch_size 12 does not divide evenly into 5 parts"):
        dataset.load(folder, Draws(12, 0), of=5)


def test_batch_larger_than_the_dataset_repeats_it(folder):
    batch = indices(folder, 1, batch_size=3 * EXAMPLES + 2, seed=0)
    counts = np.bincount(batch, minlength=EXAMPLES)
    assert counts.sum() == 3 * EXAMPLES + 2 and counts.min() == 3 and counts.max() == 4


def test_one_prompt_is_enough(tmp_path):
    tfds_prompts.write({"prompt": ["only"]}, tmp_path / "prompts")
    for batch in take(tmp_path / "prompts", 2, batch_size=3, seed=0):
        assert batch["prompt"].tolist() == ["only"] * 3


def run_python(script: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_tensorflow_and_no_wait_at_exit(folder):
    script = f"""
import sys, time
from r0_jax.prompts import dataset, order
batches = dataset.load({str(folder)!r}, order.Draws(64, 0))
next(batches)
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""
    result = run_python(script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
