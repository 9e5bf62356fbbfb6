import shutil
import warnings

import numpy as np
import pytest

from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.pipelines import families
from r0_jax.prompts import dataset, prepared
from r0_jax.stand_ins import miniature


def test_prompts_whose_removal_was_killed_are_removed_by_the_next_start(tmp_path, monkeypatch):
    folder, left = tmp_path / "prompts", tmp_path / "prompts.removed"
    dataset.prepare({"prompt": ["a", "b"]}, folder)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        prepared.remove(folder)
    assert not folder.exists() and left.exists()  # not half a folder that nobody knows
    prepared.remove(folder)
    assert not left.exists()


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(InputError, match="not a run's prompts"):
        prepared.remove(tmp_path / "prompts")
    assert (tmp_path / "prompts" / "thesis.txt").exists()


def test_prompts_edited_after_the_first_start_are_told_and_not_used(tmp_path):
    file, folder = tmp_path / "prompts.txt", tmp_path / "run" / "prompts"
    miniature.write(tmp_path / "sd", "StableDiffusionPipeline")
    pipeline = families.load(tmp_path / "sd")
    config = base.get_config()
    config.data.prompts, config.eval.num_prompts = str(file), 2

    def start():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            summary = prepared.prepare(str(file), folder, pipeline, [])
            prompts, tokens, _ = prepared.evaluation(
                config, "eval", pipeline, [], tmp_path / "run" / "eval_prompts.json"
            )
        np.testing.assert_array_equal(tokens["input_ids"], pipeline.tokenize(prompts)["input_ids"])
        return summary, prompts, [str(w.message) for w in said]

    file.write_text("a\nbb\nccc\n", "utf-8")
    first = start()
    assert first[1:] == (["a", "bb"], [])
    assert start() == first
    file.write_text("a\ndddd\nccc\n", "utf-8")
    summary, prompts, [said] = start()
    assert (summary, prompts) == first[:2]
    assert f"{file} is not what it was when this run began: it goes on with the prompts of" in said
    file.unlink()
    summary, prompts, [said] = start()
    assert (summary, prompts) == first[:2] and "is not what it was" in said

    # Prompts of the evaluations in a file of their own.
    config.eval.prompts = str(tmp_path / "other.txt")
    file.write_text("a\nbb\nccc\n", "utf-8")
    (tmp_path / "other.txt").write_text("a\ne\n", "utf-8")
    summary, prompts, [said] = start()
    assert (summary, prompts) == first[:2] and str(tmp_path / "other.txt") in said
