"""Text prompts of a run: prepared once, and the same in every evaluation."""

import dataclasses
import json
import warnings

import numpy as np

from r0_jax.pipelines import families
from r0_jax.prompts import table
from r0_jax.prompts.order import Draws
from r0_jax.prompts.text import TextPrompts
from r0_jax.rewards.reward import Reward
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


def test_a_reward_that_reads_another_text_than_the_prompt(tmp_path):
    file, folder = tmp_path / "prompts.jsonl", tmp_path / "run" / "prompts"
    texts = [("a", "xx"), ("b", "y"), ("a", "zzz"), ("a", "xx")]
    rows = [{"prompt": prompt, "words": words} for prompt, words in texts]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    miniature.write(tmp_path / "sd", "StableDiffusionPipeline")
    pipeline, source = families.load(tmp_path / "sd"), TextPrompts(str(file))

    def lengths(params, texts):
        return np.asarray([[len(text)] for text in texts], np.float32)

    reward = Reward("r", {}, lambda *_: None, lengths, width=1, reads="words")
    other = reward.renamed("prompt")
    other = dataclasses.replace(other, reads="prompt")
    said = source.prepare(folder, pipeline, [reward, other], [], Draws(2, 0, range(4)), False)
    assert said == "4 prompts, 3 of them distinct"  # by all that a row says
    found = table.Reader(folder, 4)(np.arange(3))
    assert found["features/r"].tolist() == [[2], [1], [3]]
    assert found["features/prompt"].tolist() == [[1], [1], [1]]
    kept = tmp_path / "run" / "eval_prompts.json"
    for _ in range(2):  # from the file, and from what the first start kept of it
        prompts, _, features = source.evaluation("", 2, pipeline, [reward], kept)
        assert prompts == ["a", "b"] and features["features/r"].tolist() == [[2], [1]]
        file.unlink(missing_ok=True)
