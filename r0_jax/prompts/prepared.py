"""Prepares text prompts for a run: token ids, and features for every reward.

Only rows that the run can draw are encoded. In the run's folder of prompts are

    catalog.json                what the file of prompts holds, and which rewards have features
    first.npy                   of each row of the file, the first row with the same text
    rows-N.npy, columns-N.npy   encoded texts, by the first row that holds them (`table`)
"""

import functools
import itertools
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from r0_jax.console import EncodingProgress, console
from r0_jax.errors import InputError
from r0_jax.files import Json, is_temporary, read_json, write_bytes, writing
from r0_jax.parallel import heartbeat
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.pipelines.tokenizers import CutOffWarning
from r0_jax.prompts import catalog, files, order, table
from r0_jax.prompts.catalog import Catalog
from r0_jax.prompts.columns import PROMPT, read_by
from r0_jax.prompts.order import Draws
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy
from r0_jax.weights.network import Params, row_fingerprint

SHARD = 8192  # texts in a file: a kill costs at most so many
PART = 256  # texts encoded between two signs of life
_CATALOG, _FIRST = "catalog.json", "first.npy"
_SAME = 0.02  # of their norm: most by which features differ that other devices computed


class Summary(NamedTuple):
    """Numbers of prompts.

    Attributes:
      rows: in the file.
      distinct: different ones among them.
      drawn: different ones that the run can draw.
    """

    rows: int
    distinct: int
    drawn: int


def prepare(
    path: str,
    folder: Path,
    pipeline: Pipeline,
    rewards: Sequence[Reward],
    heldout: Sequence[Reward],
    draws: Draws,
    begun: bool,
) -> Summary:
    """Encode what `draws` holds and `folder` does not; return the numbers of prompts.

    Warns of rewards, also held-out ones, that cut off the end of some prompts. A run that has
    `begun` keeps its prompts. If their file has changed since, it warns, or raises InputError where
    it needs more of them. Before, what `folder` holds for other prompts or rewards is made again.
    """
    kept = _facts(folder)
    fields = read_by((*rewards, *heldout))
    found = _scan(path, fields, may_be_gone=begun and kept is not None)
    facts = None if found is None else _describe(found, rewards)
    encoder = _Encoder(pipeline, rewards, heldout)

    def is_continued() -> bool:
        return found is not None and kept == facts and _is_made_by(encoder, folder, found)

    if kept is None or not (begun or is_continued()):
        assert found is not None and facts is not None
        _check_older(folder, found, begun)
        remove(folder)
        _begin(folder, found, facts)
        kept = facts
    elif begun and (facts is None or facts["digest"] != kept["digest"]):
        warn_of_others(path)
    first = table.open_array(folder / _FIRST)
    drawn = np.unique(first[order.rows_of(len(first), draws)])
    missing = np.setdiff1d(drawn, table.rows_in(folder), assume_unique=True)
    if len(missing):
        if begun and not is_continued():
            raise InputError(
                f"the run needs {len(missing)} more prompts, but {path} or the rewards have "
                "changed since it began: bring them back, or give another --workdir"
            )
        assert found is not None
        _encode(folder, found, missing, encoder)
    return Summary(len(first), catalog.count_distinct(first), len(drawn))


def batches(
    folder: Path, draws: Draws, parts: Sequence[int] = (0,), of: int = 1
) -> Iterator[dict[str, NDArray]]:
    """Yield the batches of `order.batches` of what `prepare` wrote for these draws."""
    first = table.open_array(folder / _FIRST)
    read = table.Reader(folder, len(first))
    return order.batches(lambda rows: read(first[rows]), len(first), draws, parts, of)


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
            for start in range(0, len(distinct), SHARD):
                encoded.append(reward.text_features(reward.params, distinct[start : start + SHARD]))
                heartbeat.beat(f"features of prompts for {reward.name}")
            found[reward.column] = np.concatenate(encoded)[rows]
    return found


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
        if not _is_ours(folder):
            raise InputError(
                f"{folder} is in the way and does not hold a run's prompts: move it, or give "
                "another --workdir"
            )
        folder.rename(away)  # in one step: half a folder would not be recognized as ours
        shutil.rmtree(away, ignore_errors=True)


class _Encoder:
    """Makes the columns of prompts."""

    def __init__(self, pipeline: Pipeline, rewards: Sequence[Reward], heldout: Sequence[Reward]):
        self._pipeline = pipeline
        self._reading = [reward for reward in rewards if reward.text_features is not None]
        self._cutting = [r for r in (*rewards, *heldout) if r.truncated is not None]

    @functools.cached_property
    def _params(self) -> dict[str, Params]:
        """Text towers are placed on the devices once."""
        return {
            reward.name: lazy.place(reward.params) if reward.text_parts else reward.params
            for reward in self._reading
        }

    def columns(
        self, texts: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, NDArray], Counter[str]]:
        """Return token ids and features; and how many prompts lose their end, by what cuts it.

        `texts` are as of `features`.
        """
        found, cut = self._tokenize(texts[PROMPT])
        for reward in self._reading:
            assert reward.text_features is not None
            read = texts[reward.reads]
            found[reward.column] = reward.text_features(self._params[reward.name], read)
        for reward in self._cutting:
            assert reward.truncated is not None
            why = f"are too long for the reward {reward.name}, which does not read their end"
            cut[why] = int(reward.truncated(texts[reward.reads]).sum())
        return found, +cut

    def _tokenize(self, prompts: Sequence[str]) -> tuple[dict[str, NDArray], Counter[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tokens = self._pipeline.tokenize(prompts)
        cut = Counter[str]()
        for warning in said:
            if isinstance(what := warning.message, CutOffWarning):
                # Two tokenizers of one length, as SDXL's, cut the same prompts.
                why = f"are longer than {what.length} tokens and are cut off there"
                cut[why] = int(what.rows.sum())
            else:
                warnings.warn(what, stacklevel=2)
        return {name: np.asarray(ids) for name, ids in tokens.items()}, cut


def _encode(folder: Path, found: Catalog, missing: NDArray, encoder: _Encoder) -> None:
    """Write shards of the missing rows; warn of prompts that are too long."""
    table.clean(folder)
    texts, cut = found.texts(missing), Counter[str]()
    with EncodingProgress(len(missing), console) as progress:

        def encoded(count: int) -> Iterator[dict[str, NDArray]]:
            while count:
                # The last two parts are one: a small one would be a program more to compile.
                part = list(itertools.islice(texts, PART if count >= 2 * PART else count))
                columns, lost = encoder.columns(files.texts_of(part, found.fields))
                cut.update(lost)
                count -= len(part)
                progress.advance(len(part))
                heartbeat.beat(f"{len(part)} prompts encoded")
                yield columns

        for start in range(0, len(missing), SHARD):
            rows = missing[start : start + SHARD]
            table.write(folder, rows, encoded(len(rows)))
    for why, count in cut.items():
        warnings.warn(
            f"{count} of {len(missing)} prompts ({count / len(missing):.0%}) {why}", stacklevel=3
        )


def _is_made_by(encoder: _Encoder, folder: Path, found: Catalog) -> bool:
    """Return whether an encoder makes what is there: it makes one row again."""
    there = table.rows_in(folder)
    if not len(there):
        return True
    row = there[:1]
    kept = table.Reader(folder, len(found.first))(row)
    made, _ = encoder.columns(files.texts_of(found.texts(row), found.fields))
    return kept.keys() == made.keys() and all(
        _are_close(kept[name], value) for name, value in made.items()
    )


def _are_close(one: NDArray, other: NDArray) -> bool:
    """Return whether columns are equal; features up to what another device rounds."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if np.issubdtype(one.dtype, np.integer):
        return np.array_equal(one, other)
    return bool(np.linalg.norm(one - other) <= _SAME * np.linalg.norm(one))


def _scan(path: str, fields: Sequence[str], may_be_gone: bool) -> Catalog | None:
    try:
        return catalog.scan(path, fields)
    except InputError:
        if may_be_gone:
            return None
        raise


def _describe(found: Catalog, rewards: Sequence[Reward]) -> Json:
    """Return what is compared when a run starts again."""
    return {
        "rows": len(found.first),
        "digest": found.digest,
        "rewards": {
            reward.column: row_fingerprint(reward.params)
            for reward in rewards
            if reward.text_features is not None
        },
    }


def _begin(folder: Path, found: Catalog, facts: Json) -> None:
    # The catalog comes first: by it the folder is known.
    write_bytes(folder / _CATALOG, json.dumps(facts, indent=1).encode())
    with writing(folder / _FIRST) as file:
        np.save(file, found.first)


def _facts(folder: Path) -> Json | None:
    """Return the facts of a folder that `_begin` has made; None if there is none."""
    whole = (folder / _CATALOG).is_file() and (folder / _FIRST).is_file()
    return read_json(folder / _CATALOG) if whole else None


def _is_ours(folder: Path) -> bool:
    return (
        (folder / _CATALOG).is_file()
        or _is_older(folder)
        or (folder.is_dir() and all(is_temporary(path.name) for path in folder.iterdir()))
    )


def _is_older(folder: Path) -> bool:
    """Return whether a folder is a tfds dataset of all prompts: runs had one before."""
    path = folder / "dataset_info.json"
    return path.is_file() and read_json(path).get("name") == "prompts"


def _check_older(folder: Path, found: Catalog, begun: bool) -> None:
    """Raise InputError if an older run, whose prompts are made anew, had others."""
    if not (begun and _is_older(folder)):
        return
    prompts = catalog.scan(found.path) if found.fields else found  # it kept no other texts
    if catalog.scan(folder).digest != prompts.digest:
        raise InputError(
            f"{found.path} has changed since this run began: bring it back, or give another "
            "--workdir"
        )
