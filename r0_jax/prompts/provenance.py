"""What made encoded prompts: facts for metadata.json, compared where the prompts are used."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from r0_jax.config import reward_entry
from r0_jax.files import Json, read_json
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.shards import Schema
from r0_jax.rewards.reward import Reward


def describe(
    schema: Schema, prompts: Mapping[str, Iterable[str]], facts: Mapping[str, object]
) -> Json:
    """Return the dataset's metadata: its columns, its prompts by their digest, and more facts."""
    columns = {
        name: {"shape": list(kind[0]), "dtype": kind[1].name}
        for name, kind in schema.items()
        if kind
    }
    return {
        **facts,
        "columns": columns,
        "prompts": {split: describe_prompts(texts) for split, texts in prompts.items()},
    }


def describe_prompts(prompts: Iterable[str]) -> Json:
    """Return how many prompts there are, how many distinct ones, and a digest of all in order."""
    digest, distinct, rows = hashlib.sha256(), set[int](), 0
    for rows, prompt in enumerate(prompts, start=1):
        digest.update(f"{'' if rows == 1 else chr(0)}{prompt}".encode())
        distinct.add(hash(prompt))
    return {"rows": rows, "distinct": len(distinct), "sha256": digest.hexdigest()}


def describe_pipeline(pipeline: Pipeline) -> Json:
    """Return the family of a pipeline and the classes of its text encoders.

    They are read from model_index.json, so that pipelines can be compared without the encoders.
    """
    index = read_json(pipeline.folder / "model_index.json")
    entries = {
        name: entry[-1]
        for name, entry in index.items()
        if name.startswith("text_encoder") and isinstance(entry, list) and entry
    }
    return {"family": index["_class_name"], **{k: v for k, v in entries.items() if v}}


def describe_reward(reward: Reward, entry: ConfigDict) -> Json:
    """Return what identifies a reward: its weights, or the user's own function; and what it asks.

    Fields at their defaults are left out, as datasets did that were written before they existed.
    """
    default = reward_entry(type=entry.type)
    asked = {name: entry[name] for name in ("language", "questions", "reads")}
    changed = {name: value for name, value in asked.items() if value != default[name]}
    facts = {"weights": reward.fingerprint(), "function": entry.function, **changed}
    return json.loads(json.dumps(facts))  # as it comes back: tuples are lists
