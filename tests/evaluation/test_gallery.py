"""Images of one job in a folder that may hold others."""

import json
import os

import numpy as np
import pytest

from r0_jax.errors import InputError
from r0_jax.evaluation import gallery, images
from r0_jax.evaluation.gallery import Gallery
from r0_jax.evaluation.layouts import LAYOUTS, Naming
from r0_jax.prompts.records import Prompt


def job(out, count, **facts):
    prompts = [Prompt(f"prompt {i}", None, {}) for i in range(count)]
    targets = LAYOUTS["flat"].targets(prompts, Naming(1))
    return Gallery(out, [prompt.text for prompt in prompts], targets, {}, facts)


def draw(work, value, overwrite=False, batches=None):
    work.begin(overwrite)
    left = work.left()
    whole = np.full((len(left), 8, 8, 3), value, np.float32)
    work.write(left, iter([whole] if batches is None else batches), {"seed": 1})
    return work.finish()


def test_a_new_job_leaves_none_of_an_old_ones_images(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"untouched")
    assert draw(job(tmp_path, 70, seed=1), 0.25)
    assert len(job(tmp_path, 70, seed=1).shown) == 64
    with pytest.raises(InputError, match=r"holds images already \(00000\.png\)"):
        draw(job(tmp_path, 2, seed=2), 0.75)
    assert draw(job(tmp_path, 2, seed=2), 0.75, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [
        "00000.png",
        "00001.png",
        "contact_sheet.png",
        "mine.png",
        "prompts.jsonl",
        "sample.json",
    ]
    assert images.load_png(tmp_path / "00001.png").mean() > 0.7


def test_the_same_job_draws_what_is_missing(tmp_path):
    def killed():
        yield np.full((2, 8, 8, 3), 0.25, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(job(tmp_path, 4, seed=1), 0, batches=killed())
    again = job(tmp_path, 4, seed=1)
    again.begin(overwrite=True)  # as the same command would
    assert [target.prompt for target in again.left()] == [2, 3]
    assert [target.prompt for target in again.left(1, 2)] == [3]
    assert not again.finish()
    assert draw(job(tmp_path, 4, seed=1), 0.75)
    assert [images.load_png(tmp_path / f"{i:05d}.png").mean() > 0.5 for i in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert draw(job(tmp_path, 4, seed=1), 0.5)  # nothing is left


def test_images_that_are_not_finite_are_not_written(tmp_path):
    images.save_png(tmp_path / "00000.png", np.ones((8, 8, 3)))
    drawn = np.zeros((2, 8, 8, 3), np.float32)
    drawn[0, 3, 4, 0] = np.nan
    with pytest.raises(InputError, match="the image of 'prompt 0' is NaN, so it is not written"):
        draw(job(tmp_path, 2), 0, overwrite=True, batches=[drawn])
    assert os.listdir(tmp_path) == ["00000.png"]
    assert images.load_png(tmp_path / "00000.png").min() == 1


def test_a_record_does_not_lead_out_of_its_folder(tmp_path):
    out = tmp_path / "out"
    images.save_png(tmp_path / "other.png", np.ones((8, 8, 3)))
    out.mkdir()
    record = {"job": {}, "files": ["../other.png", str(tmp_path / "other.png"), "x.safetensors"]}
    (out / "sample.json").write_text(json.dumps(record), "utf-8")
    (out / "x.safetensors").write_bytes(b"")
    assert gallery.check_free(out, overwrite=False) == []
