"""Text prompts of a run: prepared once, and the same in every evaluation."""

import warnings

import numpy as np

from r0_jax.pipelines import families
from r0_jax.prompts.order import Draws
from r0_jax.prompts.text import TextPrompts
from r0_jax.stand_ins import miniature


def test_prompts_edited_after_the_first_start_are_told_and_not_used(tmp_path):
    file, folder = tmp_path / "prompts.txt", tmp_path / "run" / "prompts"
    miniature.write(tmp_path / "sd", "StableDiffusionPipeline")
    pipeline = families.load(tmp_path / "sd")
    eval_prompts = ""
    source = TextPrompts(str(file))

    def start(begun=True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            summary = source.prepare(folder, pipeline, [], [], Draws(2, 0, range(4)), begun)
            prompts, tokens, _ = source.evaluation(
                eval_prompts, 2, pipeline, [], tmp_path / "run" / "eval_prompts.json"
            )
        np.testing.assert_array_equal(tokens["input_ids"], pipeline.tokenize(prompts)["input_ids"])
        return summary, prompts, [str(w.message) for w in said]

    file.write_text("a\nbb\nccc\n", "utf-8")
    first = start(begun=False)
    assert first[1:] == (["a", "bb"], [])
    assert start() == first
    file.write_text("a\ndddd\nccc\n", "utf-8")
    summary, prompts, [said] = start()
    assert (summary, prompts) == first[:2]
    assert f"{file} has changed since this run began" in said
    file.unlink()
    summary, prompts, [said] = start()
    assert (summary, prompts) == first[:2] and "has changed since" in said

    # Prompts of the evaluations in a file of their own.
    eval_prompts = str(tmp_path / "other.txt")
    file.write_text("a\nbb\nccc\n", "utf-8")
    (tmp_path / "other.txt").write_text("a\ne\n", "utf-8")
    summary, prompts, [said] = start()
    assert (summary, prompts) == first[:2] and str(tmp_path / "other.txt") in said
