"""Prepares text prompts once a run: their token ids and their features for every reward."""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.parallel import heartbeat
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts import dataset, files
from r0_jax.prompts.columns import PROMPT, from_disk, read_by, to_disk
from r0_jax.rewards.reward import Reward

_AT_ONCE = 8192  # prompts between two signs of life


def features(texts: Mapping[str, Sequence[str]], rewards: Sequence[Reward]) -> dict[str, NDArray]:
    """Return {`Reward.column`: [N, D]} of N prompts, for the rewards that read text.

    `texts` are the prompts and their other texts, by the names of `Reward.reads`.
    """
    found = {}
    for reward in rewards:
        if reward.text_features is not None:
            distinct = list(dict.fromkeys(texts[reward.reads]))
            row = {text: i for i, text in enumerate(distinct)}
            rows = np.asarray([row[text] for text in texts[reward.reads]])
            encoded = []
            for start in range(0, len(distinct), _AT_ONCE):
                encoded.append(
                    reward.text_features(reward.params, distinct[start : start + _AT_ONCE])
                )
                heartbeat.beat(f"features of prompts for {reward.name}")
            found[reward.column] = np.concatenate(encoded)[rows]
    return found


def prepare(
    path: str,
    folder: Path,
    pipeline: Pipeline,
    rewards: Sequence[Reward],
    heldout: Sequence[Reward] = (),
) -> dataset.Summary:
    """Make the dataset in `folder` unless it is there; return its size.

    Warns of rewards, also held-out ones, that cut off the end of some prompts. Warns if the prompts
    changed since the dataset was made: a run keeps the prompts that it began with.
    """
    if dataset.is_prepared(folder):
        kept = read(path, (), may_be_gone=True)
        if kept is None or dataset.digest(kept[PROMPT]) != dataset.describe(folder).digest:
            warn_of_others(path)
    else:
        texts = files.read_texts(path, read_by((*rewards, *heldout)))
        for reward in (*rewards, *heldout):
            if share := reward.truncated_share(texts[reward.reads]):
                warnings.warn(
                    f"the reward {reward.name} does not read the end of {share:.0%} of "
                    "the prompts: they are too long for it",
                    stacklevel=2,
                )
        tokens = {name: np.asarray(ids) for name, ids in pipeline.tokenize(texts[PROMPT]).items()}
        columns = tokens | features(texts, rewards)
        dataset.prepare({PROMPT: texts[PROMPT], **to_disk(columns)}, folder)
    return dataset.describe(folder)


def read(path: str, fields: Sequence[str], may_be_gone: bool) -> dict[str, list[str]] | None:
    """Return `files.read_texts`; None if the file cannot be read and `may_be_gone`."""
    try:
        return files.read_texts(path, fields)
    except InputError:
        if may_be_gone:
            return None
        raise


def warn_of_others(path: str) -> None:
    """Warn that a file of prompts changed since the run began."""
    warnings.warn(
        f"{path} has changed since this run began: the run keeps the prompts that it began with; "
        "give another --workdir to train on the new ones",
        stacklevel=3,
    )


def remove(folder: Path) -> None:
    """Remove what `prepare` made; raise InputError for a folder that is something else."""
    away = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(away, ignore_errors=True)  # a killed run may have left it
    if folder.exists():
        if not dataset.is_ours(folder):
            raise InputError(
                f"{folder} is in the way and does not hold a run's prompts: move it, or give "
                "another --workdir"
            )
        folder.rename(away)  # in one step: half a folder would not be recognized as ours
        shutil.rmtree(away, ignore_errors=True)


def batches(
    folder: Path, batch_size: int, seed: int, step: int, parts: Sequence[int], of: int
) -> Iterator[dict[str, NDArray]]:
    """Yield the batches of `dataset.load`, without the prompts' text."""
    for batch in dataset.load(folder, batch_size, seed, step, parts, of):
        del batch[PROMPT]
        yield from_disk(batch)
