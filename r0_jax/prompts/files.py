"""Prompts from a user's file: text, JSON, parquet, or a tfds dataset."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular
from r0_jax.prompts import dataset

TEXT_NAMES = ("prompt", "caption", "text")  # of a field, a column or a feature; the first counts


def read_prompts(path: str | Path, numbered: bool = False, count: int | None = None) -> list[str]:
    """Read prompts, in order, from a `.txt`, `.jsonl`, `.json` or `.parquet` file or a tfds folder.

    Text holds one prompt a line. JSON holds strings, or objects with "prompt", "caption" or "text".
    Parquet and tfds have a column of such a name; of a tfds folder the split "train" is read, else
    the first. Blank prompts are skipped. Duplicates stay: users repeat a prompt to weight it.
    Raises `InputError` that names the line. With `numbered`, images belong to prompts by number:
    then a blank prompt between others is an error, since it would shift them. With `count`, only
    the file's first prompts are read.
    """
    if not numbered:
        return list(itertools.islice(stream_prompts(path), count))
    path = _checked(path)
    prompts = list(_stripped(path))
    kept = [prompt for prompt in prompts if prompt]
    if not kept:
        raise InputError(f"{path} has no prompts")
    if any(prompts[len(kept) :]):  # or all blank ones are at the end
        where = f"{_COUNTED.get(path.suffix, 'row')} {prompts.index('') + 1}"
        raise InputError(
            f"{path}, {where} is blank, so it is unclear which images belong to the prompts after "
            "it: remove it (r0_jax.sample skips it too)"
        )
    return kept


def stream_prompts(path: str | Path) -> Iterator[str]:
    """Yield the prompts that `read_prompts` returns, without holding the file in memory.

    Only `.json` is one value, which is parsed as a whole.
    """
    path = _checked(path)
    prompts = filter(None, _stripped(path))
    if (first := next(prompts, None)) is None:
        raise InputError(f"{path} has no prompts")
    yield first
    yield from prompts


def _checked(path: str | Path) -> Path:
    """Return where a file or folder of prompts lies; raise InputError if it cannot be one."""
    path = remote.local(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    check_regular(path)
    if not path.is_dir() and path.suffix not in _READERS:
        raise InputError(
            f"{path}: cannot read prompts from {path.suffix or 'a file without suffix'}; give "
            f"{', '.join(_READERS)} or a tfds folder"
        )
    check_not_pointer(path)
    return path


def _stripped(path: Path) -> Iterator[str]:
    """Yield all prompts of a file, blank ones too, without the space around them."""
    try:
        for prompt in (_read_tfds if path.is_dir() else _READERS[path.suffix])(path):
            yield prompt.strip()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:  # parquet and tfds hold any bytes
        raise InputError(f"{path}: a prompt is not UTF-8: {error.object[:40]!r}") from None


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file; they end at "\\n", "\\r\\n" or "\\r" only.

    Other characters that `str.splitlines` knows may be part of a prompt.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                # Windows editors put a byte order mark first.
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(
                    f"{path}, line {number}: not UTF-8; save the file as UTF-8"
                ) from None
            if "\0" in text:  # UTF-16 without its byte order mark decodes without an error
                raise InputError(f"{path}: not UTF-8; save the file as UTF-8")
            yield from text.removesuffix("\n").removesuffix("\r").split("\r")


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path), start=1):
        blank = not line.strip()  # kept, so that messages name the right line
        yield "" if blank else _prompt_of(_parse_json(line, path, number), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[str]:
    items = _parse_json("\n".join(_read_lines(path)), path, 1)
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list, found {type(items).__name__}")
    for number, item in enumerate(items, start=1):
        yield _prompt_of(item, f"{path}, item {number}")


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow  # slow to import, and only this format needs it
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            name = _pick_name(file.schema_arrow.names, path, "columns")
            for part in file.iter_batches(columns=[name]):  # all of that name; the first counts
                for value in part.column(part.schema.names.index(name)).to_pylist():
                    number += 1
                    yield _prompt_of("" if value is None else value, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def _read_tfds(path: Path) -> Iterator[str]:
    if not dataset.is_prepared(path):
        raise InputError(
            f"{path} has no dataset_info.json; give the folder of one version of a tfds dataset, "
            "such as name/1.0.0"
        )
    import tensorflow_datasets as tfds

    builder = dataset.open_builder(path)
    features = builder.info.features
    texts = [name for name in features if isinstance(features[name], tfds.features.Text)]
    name = _pick_name(texts, path, "text features")
    if not builder.info.splits:
        raise InputError(f"{path} has no split: is the dataset complete?")
    splits = builder.info.splits
    split = dataset.SPLIT if dataset.SPLIT in splits else next(iter(splits))
    # Of each record only the text is parsed: decoding images would need other packages.
    only_text = tfds.features.FeaturesDict({name: features[name]})
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    with dataset.reading(path):
        source = builder.as_data_source(split=split, deserialize_method=raw)
        for record in source:
            yield only_text.deserialize_example_np(record)[name].decode("utf-8")


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# What messages count in a file; in a parquet file and a tfds folder they count rows.
_COUNTED = {".txt": "line", ".jsonl": "line", ".json": "item"}


def _parse_json(text: str, path: Path, line: int) -> object:
    """Parse text that starts at that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise InputError(f"{where}: broken JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise InputError(f"{path}, line {line}: {error}") from None


def _prompt_of(item: object, where: str) -> str:
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


def _pick_name(names: Sequence[str] | Mapping[str, object], where: object, kind: str) -> str:
    for name in TEXT_NAMES:
        if name in names:
            return name
    found = ", ".join(map(str, names)) or "none"
    raise InputError(f"{where}: no {' or '.join(TEXT_NAMES)} among the {kind} ({found})")
