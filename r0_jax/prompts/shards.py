"""Writes a tfds dataset shard by shard.

A killed writer resumes, and several processes share the work without talking to each other. A shard
is a file of consecutive rows and appears whole or not at all. Its rows depend on the number of rows
alone, so every process would write the same bytes. dataset_info.json is written last and marks the
dataset as complete.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from r0_jax.errors import InputError
from r0_jax.files import Json, write_bytes
from r0_jax.pipelines.pipeline import LENGTHS
from r0_jax.prompts.columns import EMBEDS, is_ragged

if TYPE_CHECKING:
    from tensorflow_datasets.features import FeaturesDict
else:  # tfds takes seconds to import
    FeaturesDict = object

NAME = "encoded_prompts"  # of the dataset; its files begin with it
_INFO, _METADATA = "dataset_info.json", "metadata.json"

# The shape of a row of a column, and its dtype.
Kind = tuple[tuple[int, ...], np.dtype]  # type: ignore[explicit-any]  # by default in numpy
Schema = dict[str, Kind | None]  # of each column; None is text
Columns = dict[str, NDArray | list[str]]  # of some rows


class Shard(NamedTuple):
    """Rows `start` to `stop` of a split, in the file `number` of `count`."""

    split: str
    number: int
    count: int  # type: ignore[assignment]  # hides the method of tuples
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Return the file's name, as tfds expects it."""
        return f"{NAME}-{self.split}.array_record-{self.number:05d}-of-{self.count:05d}"


def plan(rows: Mapping[str, int], shard_rows: int) -> list[Shard]:
    """Return the shards of all splits ({split: number of rows}).

    Each has `shard_rows` rows; the last one of a split may have fewer.
    """
    return [
        Shard(split, number, -(-count // shard_rows), start, min(start + shard_rows, count))
        for split, count in rows.items()
        for number, start in enumerate(range(0, count, shard_rows))
    ]


def begin(folder: Path, metadata: Mapping[str, object]) -> bool:
    """Claim the folder for the dataset that `metadata` (JSON) describes.

    Returns whether the dataset is complete. Raises InputError, which names the difference, if the
    folder holds anything else. Only "sources" may differ: a file that has moved is still the same.
    """
    path = folder / _METADATA
    if there := _read_metadata(path):
        for name, value in json.loads(json.dumps(metadata)).items():
            if name != "sources" and there.get(name) != value:
                raise InputError(
                    f"{folder} was begun with other {name}: "
                    f"{_shortly(there.get(name))} there, {_shortly(value)} here; "
                    "delete it, or give another folder"
                )
        return (folder / _INFO).is_file()
    if folder.exists() and (
        not folder.is_dir()
        or any(not path.name.startswith(f".{_METADATA}") for path in folder.iterdir())
    ):
        raise InputError(
            f"{folder} is in the way and holds no encoded prompts: move it, or give another folder"
        )
    write_bytes(path, json.dumps(metadata, indent=1, ensure_ascii=False).encode("utf-8"))
    return False


def _read_metadata(path: Path) -> Json:
    """Return the metadata of a dataset that `begin` has begun; {} for anything else."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return there if isinstance(there, dict) and "columns" in there else {}


def write(folder: Path, shard: Shard, schema: Schema, parts: Iterable[Columns]) -> None:
    """Write one shard from parts of its rows, in order."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features(schema)
    serializer = ExampleSerializer(features.get_serialized_info())
    handle, building = tempfile.mkstemp(dir=folder, prefix=f".{shard.file}.", suffix=".tmp")
    os.close(handle)
    try:
        with contextlib.closing(ArrayRecordWriter(building, "group_size:1")) as writer:
            for part in parts:
                for values in zip(*(part[name] for name in schema), strict=True):
                    row = dict(zip(schema, values, strict=True))
                    if is_ragged(schema):
                        row[EMBEDS] = row[EMBEDS][: int(row[LENGTHS])]
                    encoded = features.encode_example(row)
                    # Otherwise the order of a record's columns differs between runs.
                    writer.write(
                        serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
                    )
        try:
            os.chmod(building, 0o644)
            os.replace(building, folder / shard.file)
        except FileNotFoundError:  # another process wrote the same, and has finished the dataset
            if not (folder / shard.file).is_file():
                raise
    finally:
        if os.path.exists(building):
            os.unlink(building)


def missing(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Return the shards that are not written yet."""
    return [shard for shard in shards if not (folder / shard.file).is_file()]


def finish(folder: Path, shards: Sequence[Shard], schema: Schema) -> None:
    """Make a tfds dataset of shards that are all there; remove what killed writers left."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.splits import SplitDict, SplitInfo

    identity = DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), module_name="", data_dir=os.fspath(folder)
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=_features(schema), disable_shuffling=True
    )
    info.set_file_format("array_record")
    splits: dict[str, list[Shard]] = {}
    for shard in shards:
        splits.setdefault(shard.split, []).append(shard)
    info.set_splits(
        SplitDict(
            [
                SplitInfo(
                    split,
                    [shard.stop - shard.start for shard in found],
                    sum((folder / shard.file).stat().st_size for shard in found),
                )
                for split, found in splits.items()
            ]
        )
    )
    with tempfile.TemporaryDirectory() as building:
        info.write_to_directory(building)
        # The file that marks the dataset as complete comes last.
        for path in sorted(Path(building).iterdir(), key=lambda path: path.name == _INFO):
            write_bytes(folder / path.name, path.read_bytes())
    for path in folder.glob(f".{NAME}-*.tmp"):
        path.unlink(missing_ok=True)


def _features(schema: Schema) -> FeaturesDict:
    """Return a schema as tfds features."""
    import tensorflow_datasets as tfds

    def shape(name: str, full: tuple[int, ...]) -> tuple[int | None, ...]:
        return (None, *full[1:]) if name == EMBEDS and is_ragged(schema) else full

    return tfds.features.FeaturesDict(
        {
            # Bytes are fast to write and exact for every dtype.
            name: tfds.features.Text()
            if kind is None
            else tfds.features.Tensor(shape=shape(name, kind[0]), dtype=kind[1], encoding="bytes")
            for name, kind in schema.items()
        }
    )


def _shortly(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
