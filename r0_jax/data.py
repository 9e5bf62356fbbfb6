"""Prompts: from a user's file, through a prepared tfds dataset, to batches that depend only on
(seed, step)."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from r0_jax import remote
from r0_jax.errors import InputError

TEXT_NAMES = ("prompt", "caption", "text")  # of a JSON object, a column or a feature, in order
_SPLIT = "train"
# Batches made ahead by threads: a step takes longer than a batch, so few suffice.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


# --- reading a user's prompts ------------------------------------------------------------


def read_prompts(path: str | Path, numbered: bool = False) -> list[str]:
    """The prompts of a `.txt`, `.jsonl`, `.json` or `.parquet` file or a tfds folder, in order.

    Blank ones are left out. Duplicates stay: repeating a prompt is how a user weights it. Text
    is one prompt a line; JSON holds strings or objects with "prompt", "caption" or "text";
    parquet and tfds have a column of such a name (of a tfds folder, the split "train" or else
    the first). Raises `InputError` that names the line; where prompts are `numbered`, by images,
    also for a blank one between others, which would shift them.
    """
    path = remote.local(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if not path.is_dir() and path.suffix not in _READERS:
        raise InputError(
            f"{path}: cannot read prompts from {path.suffix or 'a file without suffix'}; give "
            f"{', '.join(_READERS)} or a tfds folder"
        )
    try:
        found = (_read_tfds if path.is_dir() else _READERS[path.suffix])(path)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:  # parquet and tfds hold any bytes
        raise InputError(f"{path}: a prompt is not UTF-8: {error.object[:40]!r}") from None
    prompts = [prompt.strip() for prompt in found]
    kept = [prompt for prompt in prompts if prompt]
    if not kept:
        raise InputError(f"{path} has no prompts")
    if numbered and any(prompts[len(kept):]):  # or all blank ones are at the end
        where = f"{_COUNTED.get(path.suffix, 'row')} {prompts.index('') + 1}"
        raise InputError(f"{path}, {where} is blank, so which images belong to the prompts after "
                         "it is unclear: take it out (r0_jax.sample counts without it)")
    return kept


def _read_txt(path: Path) -> list[str]:
    # Not splitlines(): it also splits at characters that may stand inside a prompt.
    return _read_text(path).split("\n")


def _read_jsonl(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        blank = not line.strip()  # kept, as in text: what follows is told by its line
        prompts.append("" if blank else _prompt_of(_parse_json(line, path, number),
                                                   f"{path}, line {number}"))
    return prompts


def _read_json(path: Path) -> list[str]:
    items = _parse_json(_read_text(path), path, 1)
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list, found {type(items).__name__}")
    return [_prompt_of(item, f"{path}, item {i}") for i, item in enumerate(items, start=1)]


def _read_parquet(path: Path) -> list[str]:
    import pyarrow  # slow to import, and only this format needs it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            name = _pick_name(file.schema_arrow.names, path, "columns")
            table = file.read(columns=[name])  # all of that name; the first one counts
            values = table.column(table.column_names.index(name)).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    blank = ("" if value is None else value for value in values)
    return [_prompt_of(value, f"{path}, row {i}") for i, value in enumerate(blank, start=1)]


def _read_tfds(path: Path) -> list[str]:
    if not is_prepared(path):
        raise InputError(
            f"{path} has no dataset_info.json; give the folder of one version of a tfds dataset, "
            "such as name/1.0.0"
        )
    builder = _open(path)
    features = builder.info.features
    texts = [name for name in features if isinstance(features[name], tfds.features.Text)]
    name = _pick_name(texts, path, "text features")
    if not builder.info.splits:
        raise InputError(f"{path} has no split: is the dataset complete?")
    split = _SPLIT if _SPLIT in builder.info.splits else next(iter(builder.info.splits))
    # Of each record only the text is parsed: decoding images would need other packages.
    only_text = tfds.features.FeaturesDict({name: features[name]})
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    with _reading(path):
        source = builder.as_data_source(split=split, deserialize_method=raw)
        records = [only_text.deserialize_example_np(record) for record in source]
    return [record[name].decode("utf-8") for record in records]


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# What a message counts in a file: of a parquet file and a tfds folder, rows.
_COUNTED = {".txt": "line", ".jsonl": "line", ".json": "item"}


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if "\0" in text:  # UTF-16 without its mark decodes without an error
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_json(text: str, path: Path, line: int) -> Any:
    """`text`, which starts at that line of the file, as a Python value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise InputError(f"{where}: broken JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise InputError(f"{path}, line {line}: {error}") from None


def _prompt_of(item: Any, where: str) -> str:
    if isinstance(item, dict):
        name = _pick_name(item, where, "fields")
        item = item[name]
    if not isinstance(item, str):
        raise InputError(f"{where}: expected a prompt as text, found {type(item).__name__}")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud83d"
        raise InputError(f"{where}: the prompt holds half of a surrogate pair") from None
    return item


def _pick_name(names: Sequence[str] | Mapping[str, Any], where: Any, kind: str) -> str:
    for name in TEXT_NAMES:
        if name in names:
            return name
    found = ", ".join(map(str, names)) or "none"
    raise InputError(f"{where}: no {' or '.join(TEXT_NAMES)} among the {kind} ({found})")


# --- the prepared dataset ----------------------------------------------------------------


class Summary(NamedTuple):
    """How many examples a prepared dataset has, how many different prompts, and the `digest` of
    them all, in order."""

    examples: int
    distinct_prompts: int
    digest: str


def digest(prompts: Sequence[str]) -> str:
    """16 characters that are others for other prompts, or another order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def prepare(examples: Mapping[str, np.ndarray | list[str]], folder: str | Path) -> None:
    """Writes the columns, of which "prompt" is one, as a tfds dataset in array_record files.

    Lists become Text, arrays [N, ...] become Tensor with their row's shape and dtype. Record i
    is example i. The folder appears whole or not at all: it is built beside it as
    `<folder>.tmp`, which a killed run may leave and the next call replaces. One process writes;
    the others of a pod wait for it.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; delete it to prepare the prompts anew")
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it is "downloading"
            builder = _Prompts(examples, data_dir=building, file_format="array_record")
            builder.download_and_prepare()
        os.replace(builder.data_dir, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Prompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "prompts"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for it imports an undeclared dependency

    def __init__(self, examples: Mapping[str, np.ndarray | list[str]], **kwargs):
        self._examples = examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {}
        for name, values in self._examples.items():
            if isinstance(values, list):
                features[name] = tfds.features.Text()
            else:
                # As bytes: six times faster to write than lists of numbers, and exact for
                # every dtype, bfloat16 and scalars included.
                features[name] = tfds.features.Tensor(
                    shape=values.shape[1:], dtype=values.dtype, encoding="bytes"
                )
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(distinct_prompts=len(set(self._examples["prompt"])),
                                            digest=digest(self._examples["prompt"])),
            disable_shuffling=True,  # grain shuffles on reading
        )

    def _split_generators(self, dl_manager):
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self):
        for i, row in enumerate(zip(*self._examples.values(), strict=True)):
            yield i, dict(zip(self._examples, row, strict=True))


def is_prepared(folder: str | Path) -> bool:
    """Whether there is a finished dataset in the folder."""
    return (Path(folder) / "dataset_info.json").is_file()


def is_ours(folder: str | Path) -> bool:
    """Whether `prepare` made the folder."""
    return is_prepared(folder) and _open(folder).info.name == _Prompts.name


def describe(folder: str | Path) -> Summary:
    """Counts of a prepared dataset."""
    info = _open(folder).info
    return Summary(info.splits[_SPLIT].num_examples, info.metadata["distinct_prompts"],
                   info.metadata.get("digest", ""))


def open_info(folder: str | Path) -> tfds.core.DatasetInfo:
    """Features and splits of any finished tfds folder; InputError if it cannot be read."""
    return _open(folder).info


def check_shards(folder: str | Path) -> None:
    """InputError if a file of any split is missing or cut short: the last record of each is read,
    and a cut file has lost its index."""
    builder = _open(folder)
    for name, split in builder.info.splits.items():
        with _reading(folder):
            source = builder.as_data_source(split=name)
            for end in itertools.accumulate(split.shard_lengths):
                source[end - 1]


def read(folder: str | Path, split: str, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Some rows of a split, by column; text as arrays of str."""
    with _reading(folder):
        return _read(_open(folder).as_data_source(split=split), np.asarray(rows))


def load(
    folder: str | Path,
    batch_size: int,
    seed: int,
    step: int = 0,
    parts: Sequence[int] = (0,),
    of: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches `step`, `step + 1`, ... of a prepared dataset, forever.

    The rows are these `parts` of `of` equal, contiguous parts of the global batch of
    `batch_size`, which depends only on (seed, step): not on the number of processes nor on where
    one starts. An epoch is a permutation of all examples; the epochs follow each other without a
    gap, so a batch may hold the end of one and the start of the next. Text columns are arrays of
    str.
    """
    if batch_size % of:
        raise InputError(f"batch_size {batch_size} does not divide evenly into {of} parts")
    with _reading(folder):
        source = _open(folder).as_data_source(split=_SPLIT)
        source[0], source[len(source) - 1]  # a missing or cut file shows here, not in a thread
    all_parts = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()  # anew each epoch
        .repeat(2**31)  # forever; grain's own "forever" overflows with batches of one row
        .batch(batch_size // of)
    )

    def read(step: int) -> dict[str, np.ndarray]:
        # Indices are batched, not records: array_record reads a batch at once several times faster.
        return _read(source, np.concatenate([all_parts[step * of + part] for part in parts]))

    steps = grain.MapDataset.range(step, 2**31).map(read)
    return iter(steps.to_iter_dataset(_READ_OPTIONS))


def _read(source: Sequence[Mapping[str, Any]], rows: np.ndarray) -> dict[str, np.ndarray]:
    records = source.__getitems__(rows.tolist())
    columns = {name: [record[name] for record in records] for name in records[0]}
    return {
        name: np.array([value.decode("utf-8") for value in values])
        if isinstance(values[0], bytes)
        else np.stack(values)
        for name, values in columns.items()
    }


def _open(folder: str | Path) -> tfds.core.DatasetBuilder:
    if not is_prepared(folder):
        raise InputError(f"{folder} is not a prepared dataset: it has no dataset_info.json")
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # of protobuf, json or tfds, by which file is missing or cut short
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder} cannot be read ({reason}): is the dataset complete?") from None


@contextlib.contextmanager
def _reading(folder: str | Path) -> Iterator[None]:
    """Turns what tfds and array_record raise for broken files into an `InputError`."""
    try:
        yield
    except NotImplementedError:
        raise InputError(
            f"{folder} is a tfds dataset without random access; prepare it with "
            "file_format='array_record'"
        ) from None
    except RuntimeError as error:
        raise InputError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from None
