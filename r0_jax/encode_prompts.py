"""Encodes the prompts of a config once, so that training needs no text encoder.

    python -m r0_jax.encode_prompts --config=configs/sd3_r0.py --config.pretrained=DIR \\
        --config.data.prompts=prompts.txt --out=ENCODED
    python -m r0_jax.main --config=configs/sd3_r0.py --config.pretrained=DIR \\
        --config.data.encoded=ENCODED --workdir=W

It encodes the training prompts, those of eval and test, and the empty prompt. It adds the text
features of all rewards, also held-out ones. The same command resumes a killed run. Several
processes share the work by --process and --processes, or as jax.distributed counts them. With
--config.data.encoded=DIR it takes the embeddings from that dataset and adds features to them.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from r0_jax import cli, compilation_cache, config_check, remote, rewards
from r0_jax.console import EncodingProgress
from r0_jax.errors import InputError, of_config
from r0_jax.evaluation.batches import batches
from r0_jax.files import check_writable
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline, take
from r0_jax.prompts import columns, dataset, encoded, encoded_writer, files, provenance, shards
from r0_jax.prompts.columns import PROMPT
from r0_jax.prompts.encoded import EVALUATION, NEGATIVE, TRAIN
from r0_jax.prompts.shards import Columns, Shard
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy
from r0_jax.weights.network import fingerprint

console = Console(stderr=True)


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("out", None, "folder of the dataset", required=True)
    flags.DEFINE_enum("dtype", "bfloat16", list(encoded_writer.DTYPES), "dtype of floats on disk")
    flags.DEFINE_integer("batch_size", 32, "prompts encoded at once", lower_bound=1)
    flags.DEFINE_integer(
        "shard_prompts",
        encoded_writer.SHARD_PROMPTS,
        "prompts in a file: a kill costs at most so many",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "process", None, "number of this process among those that share the work", lower_bound=0
    )
    flags.DEFINE_integer(
        "processes", None, "number of processes that share the work", lower_bound=1
    )
    cli.define_config()


class Embeddings(NamedTuple):
    """Embeddings to be written.

    Attributes:
      texts: of each split, the prompts in order, and what rewards read besides.
      parts: shard -> its columns ("prompt_embeds", ...), in parts of its rows.
      facts: what the metadata says of them.
    """

    texts: dict[str, dict[str, list[str]]]
    parts: Callable[[Shard], Iterator[Columns]]
    facts: dict[str, Any]

    @property
    def prompts(self) -> dict[str, list[str]]:
        """The prompts of each split, in order."""
        return {split: texts[PROMPT] for split, texts in self.texts.items()}


def of_text(config: ConfigDict, batch_size: int, fields: Sequence[str]) -> Embeddings:
    """Compute embeddings with the pipeline's text encoders; all prompts are tokenized at once."""
    pipeline = families.load(config.pretrained, config.dtype, config.family, images=False)
    texts = {TRAIN: files.read_texts(config.data.prompts, fields), NEGATIVE: {PROMPT: [""]}}
    asked = [
        itertools.islice(files.stream_rows(section.prompts, fields), section.num_prompts)
        for section in (config.eval, config.test)
        if section.prompts
    ]
    if asked:
        texts[EVALUATION] = _distinct(itertools.chain(*asked), fields)
    tokens = pipeline.shorten(
        {split: pipeline.tokenize(found[PROMPT]) for split, found in texts.items()}
    )
    mesh = sharding.local_mesh()
    params = lazy.place(pipeline.params, sharding.replicated(mesh))
    # Over all devices if they divide a batch.
    where = (
        sharding.batch_sharding(mesh)
        if batch_size % sharding.batch_parts(mesh) == 0
        else sharding.replicated(mesh)
    )

    @jax.jit
    def encode(params, ids):
        return pipeline.encode_text(params, ids)

    @jax.jit
    def negative(params, ids):
        told = pipeline.encode_negative(params, ids, pipeline.encode_prompt(params, ids))
        return {name: told[name] for name in pipeline.embeds}

    def parts(shard: Shard) -> Iterator[Columns]:
        ids = tokens[shard.split]
        if shard.split == NEGATIVE:
            yield jax.device_get(negative(params, ids))
            return
        for rows, count in batches(shard.stop - shard.start, batch_size):
            tokens_in = jax.device_put(take(ids, shard.start + rows), where)
            found = jax.device_get(encode(params, tokens_in))
            yield {name: value[:count] for name, value in found.items()}

    lengths = {name: ids.shape[1] for name, ids in tokens[NEGATIVE].items()}
    facts = {
        "pipeline": provenance.describe_pipeline(pipeline),
        "tokens": lengths,
        "computed_in": config.dtype,
        "text_encoders": _fingerprints(pipeline),
    }
    return Embeddings(texts, parts, facts)


def _distinct(rows: Iterable[files.Row], fields: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of distinct prompts: evaluations find them by the prompt alone."""
    found: dict[str, files.Row] = {}
    for row in rows:
        if found.setdefault(row[0], row) != row:
            raise InputError(
                f"{row[0]!r} is there twice among the evaluation prompts, with another "
                f"{' or '.join(fields)}: keep one of them"
            )
    return files.texts_of(found.values(), fields)


def of_dataset(config: ConfigDict, batch_size: int, fields: Sequence[str]) -> Embeddings:
    """Read embeddings from a dataset, perhaps of the user's own text encoder."""
    there = encoded.open_folder(config.data.encoded)
    if fields:
        raise InputError(
            f"{there.folder} holds prompts without their field {fields[0]!r}, which a reward "
            "reads: encode the file of prompts, with --config.data.encoded="
        )
    dataset.check_shards(there.folder)
    there.check_prompts(config.data.prompts)
    embeds = [name for name in there.schema if not columns.is_features(name)]

    def read(shard: Shard) -> Iterator[dict[str, np.ndarray]]:
        for start in range(shard.start, shard.stop, batch_size):
            yield there.read(shard.split, range(start, min(start + batch_size, shard.stop)))

    def parts(shard: Shard) -> Iterator[Columns]:
        for found in read(shard):
            yield {name: found[name] for name in embeds}

    texts = {
        split: {
            PROMPT: [
                text for part in read(Shard(split, 0, 1, 0, rows)) for text in part[PROMPT].tolist()
            ]
        }
        for split, rows in there.rows.items()
    }
    kept = ("pipeline", "tokens", "computed_in", "text_encoders")
    return Embeddings(
        texts, parts, {name: there.metadata[name] for name in kept if name in there.metadata}
    )


def load_rewards(config: ConfigDict) -> dict[str, Reward]:
    """Load all rewards of the config that read prompts."""
    entries = {**config.rewards, **config.heldout_rewards}
    loaded = {name: rewards.load(name, entry, config.dtype) for name, entry in entries.items()}
    return {name: reward for name, reward in loaded.items() if reward.text_features is not None}


def encode(
    config: ConfigDict,
    out: Path,
    *,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    shard_prompts: int = encoded_writer.SHARD_PROMPTS,
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Write this process's share of the dataset; return whether the dataset is complete."""
    find = of_dataset if config.data.encoded else of_text
    found = load_rewards(config)
    embeddings = find(config, batch_size, columns.read_by(found.values()))
    for reward in found.values():
        if share := reward.truncated_share(embeddings.texts[TRAIN][reward.reads]):
            warnings.warn(
                f"the reward {reward.name} does not read the end of {share:.0%} of "
                "the prompts: they are too long for it",
                stacklevel=2,
            )

    @functools.cache
    def device_params(name: str):
        return lazy.place(found[name].params)

    def features(split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        texts = embeddings.texts[split]
        return {
            reward.column: np.asarray(
                reward.text_features(device_params(name), texts[reward.reads][start:stop])
            )
            for name, reward in found.items()
        }

    # One prompt tells the columns.
    one = next(
        embeddings.parts(Shard(NEGATIVE if NEGATIVE in embeddings.prompts else TRAIN, 0, 1, 0, 1))
    )
    texts = embeddings.prompts[TRAIN]
    schema = encoded_writer.schema_of({PROMPT: texts[:1], **one, **features(TRAIN, 0, 1)}, dtype)
    entries = {**config.rewards, **config.heldout_rewards}
    facts = {
        **embeddings.facts,
        "dtype": dtype,
        "shard_prompts": shard_prompts,
        "rewards": {
            name: provenance.describe_reward(reward, entries[name])
            for name, reward in found.items()
        },
        "sources": {
            "pretrained": config.pretrained,
            "prompts": config.data.prompts,
            "encoded": config.data.encoded,
        },
    }
    metadata = provenance.describe(schema, embeddings.prompts, facts)
    rows = {split: len(texts) for split, texts in embeddings.prompts.items()}
    mine = shards.missing(out, shards.plan(rows, shard_prompts)[process::processes])

    with EncodingProgress(sum(shard.stop - shard.start for shard in mine), console) as progress:

        def source(shard: Shard) -> Iterator[Columns]:
            texts, start = embeddings.prompts[shard.split], shard.start
            # Nobody asks for features of the empty prompt, and a reward may fail on it.
            known = (
                features(shard.split, shard.start, shard.stop)
                if shard.split != NEGATIVE
                else {
                    name: np.zeros((1, *kind[0]), kind[1])
                    for name, kind in schema.items()
                    if columns.is_features(name)
                }
            )
            for part in embeddings.parts(shard):
                stop = start + len(next(iter(part.values())))
                rows = slice(start - shard.start, stop - shard.start)
                yield {
                    PROMPT: texts[start:stop],
                    **part,
                    **{name: value[rows] for name, value in known.items()},
                }
                progress.advance(stop - start)
                start = stop

        return encoded_writer.write_shards(
            out, rows, schema, metadata, source, shard_prompts, process, processes
        )


def _fingerprints(pipeline: Pipeline) -> dict[str, str]:
    return {part: fingerprint(params) for part, params in pipeline.params.items()}


def main(argv: list[str]) -> None:
    del argv
    fields, config = flags.FLAGS, flags.FLAGS.config
    if (fields.process is None) != (fields.processes is None):
        raise InputError("--process and --processes go together")
    process = jax.process_index() if fields.process is None else fields.process
    processes = jax.process_count() if fields.processes is None else fields.processes
    if process >= processes:
        raise InputError(f"--process={process} must be below --processes={processes}")
    with of_config():
        config_check.check_config(config)
    compilation_cache.keep(config.compilation_cache)
    out = remote.output(fields.out)
    check_writable(out)
    complete = encode(
        config,
        out,
        dtype=fields.dtype,
        batch_size=fields.batch_size,
        shard_prompts=fields.shard_prompts,
        process=process,
        processes=processes,
    )
    print(
        f"{out} is complete: train with --config.data.encoded={out}"
        if complete
        else f"the share of process {process} is in {out}; other processes are still encoding"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
