"""Prompts -> the run's prepared dataset: token ids, and every reward's text features, once."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r0_jax.errors import InputError
from r0_jax.parallel import heartbeat
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts import dataset, files
from r0_jax.prompts.columns import PROMPT, from_disk, to_disk
from r0_jax.rewards.reward import Reward

_AT_ONCE = 8192  # prompts between two signs of life


def features(prompts: Sequence[str], rewards: Sequence[Reward]) -> dict[str, np.ndarray]:
    """ "features/<reward>" float32 [N, D] of every prompt, for the rewards that read prompts."""
    found = {}
    distinct = list(dict.fromkeys(prompts))
    row = {prompt: i for i, prompt in enumerate(distinct)}
    rows = np.asarray([row[prompt] for prompt in prompts])
    for reward in rewards:
        if reward.text_features is not None:
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
    """Makes the dataset in `folder`, unless it is there from before; returns its size. Warns of
    rewards, those held out too, that do not read some prompts to their end, and of prompts that
    are not those of before: a run goes on as it began."""
    there = dataset.is_prepared(folder)
    prompts = read(path, there)
    if there:
        if prompts is None or dataset.digest(prompts) != dataset.describe(folder).digest:
            warn_of_others(path)
    else:
        for reward in (*rewards, *heldout):
            if share := reward.truncated_share(prompts):
                warnings.warn(
                    f"the reward {reward.name} does not read the end of {share:.0%} of "
                    "the prompts: they are too long for it",
                    stacklevel=2,
                )
        columns = pipeline.tokenize(prompts) | features(prompts, rewards)
        dataset.prepare({PROMPT: prompts, **to_disk(columns)}, folder)
    return dataset.describe(folder)


def read(path: str, may_be_gone: bool) -> list[str] | None:
    """The prompts of a file; None where it cannot be read any more and need not be."""
    try:
        return files.read_prompts(path)
    except InputError:
        if may_be_gone:
            return None
        raise


def warn_of_others(path: str) -> None:
    warnings.warn(
        f"{path} is not what it was when this run began: it goes on with the prompts of "
        "then; to train on those of now give another --workdir",
        stacklevel=3,
    )


def remove(folder: Path) -> None:
    """Removes what `prepare` made; InputError for a folder that is something else."""
    away = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(away, ignore_errors=True)  # of a kill
    if folder.exists():
        if not dataset.is_ours(folder):
            raise InputError(
                f"{folder} is in the way, and not a run's prompts: move it, or give "
                "another --workdir"
            )
        folder.rename(away)  # in one step: half of it would be known as nobody's
        shutil.rmtree(away, ignore_errors=True)


def batches(folder: Path, batch_size: int, seed: int, step: int, parts: Sequence[int], of: int):
    """Parts of batches from `step` on, without the prompts' text, as numpy arrays."""
    for batch in dataset.load(folder, batch_size, seed, step, parts, of):
        del batch[PROMPT]
        yield from_disk(batch)
