"""Prompts from a user's file: text, JSON, parquet, or a tfds dataset."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular
from r0_jax.prompts import dataset

PROMPT = "prompt"
TEXT_NAMES = (PROMPT, "caption", "text")  # of a field, a column or a feature; the first counts

Row = tuple[str, ...]  # a prompt, and further texts of its record


def read_prompts(path: str | Path, numbered: bool = False) -> list[str]:
    """Read prompts, in order, from a `.txt`, `.jsonl`, `.json` or `.parquet` file or a tfds folder.

    Text holds one prompt a line. JSON holds strings, or objects with "prompt", "caption" or "text".
    Parquet and tfds have a column of such a name; of a tfds folder the split "train" is read, else
    the first. Blank prompts are skipped. Duplicates stay: users repeat a prompt to weight it.
    Raises `InputError` that names the line. With `numbered`, images belong to prompts by number:
    then a blank prompt between others is an error, since it would shift them.
    """
    return read_texts(path, (), numbered)[PROMPT]


def read_texts(
    path: str | Path, fields: Sequence[str] = (), numbered: bool = False
) -> dict[str, list[str]]:
    """Read prompts as `read_prompts` does, and further text `fields` of theirs.

    Returns {"prompt": [...], field: [...], ...}, lists of one length. Raises `InputError` where a
    prompt has no such field, or a blank one.
    """
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
    try:
        found = (_read_tfds if path.is_dir() else _READERS[path.suffix])(path, fields)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:  # parquet and tfds hold any bytes
        raise InputError(f"{path}: a prompt is not UTF-8: {error.object[:40]!r}") from None
    rows = [tuple(text.strip() for text in row) for row in found]
    kept = [row for row in rows if row[0]]
    if not kept:
        raise InputError(f"{path} has no prompts")

    def where(row: int) -> str:
        return f"{path}, {_COUNTED.get(path.suffix, 'row')} {row + 1}"

    if numbered and any(row[0] for row in rows[len(kept) :]):  # or all blank ones are at the end
        blank = next(i for i, row in enumerate(rows) if not row[0])
        raise InputError(
            f"{where(blank)} is blank, so it is unclear which images belong to the prompts after "
            "it: remove it (r0_jax.sample skips it too)"
        )
    for i, row in enumerate(rows):
        if row[0] and not all(row):
            raise InputError(f"{where(i)}: the field {fields[row.index('') - 1]!r} is blank")
    return dict(zip((PROMPT, *fields), map(list, zip(*kept, strict=True)), strict=True))


def _read_txt(path: Path, fields: Sequence[str]) -> list[Row]:
    if fields:
        raise InputError(
            f"{path} holds prompts alone, but a reward reads {fields[0]!r}: give a .jsonl, .json "
            "or .parquet file with such a field"
        )
    # splitlines() would also split at characters that a prompt may contain.
    return [(line,) for line in _read_text(path).split("\n")]


def _read_jsonl(path: Path, fields: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        blank = not line.strip()  # kept, so that messages name the right line
        rows.append(
            ("",) * (1 + len(fields))
            if blank
            else _row_of(_parse_json(line, path, number), fields, f"{path}, line {number}")
        )
    return rows


def _read_json(path: Path, fields: Sequence[str]) -> list[Row]:
    items = _parse_json(_read_text(path), path, 1)
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list, found {type(items).__name__}")
    return [_row_of(item, fields, f"{path}, item {i}") for i, item in enumerate(items, start=1)]


def _read_parquet(path: Path, fields: Sequence[str]) -> list[Row]:
    import pyarrow  # slow to import, and only this format needs it
    from pyarrow import parquet

    def values(table: pyarrow.Table, name: str) -> list[str]:
        # All columns of that name are there; the first counts.
        found = table.column(table.column_names.index(name)).to_pylist()
        return [
            "" if value is None else _text_of(value, f"{path}, row {i}")
            for i, value in enumerate(found, start=1)
        ]

    try:
        with parquet.ParquetFile(path) as file:
            names = _pick_names(file.schema_arrow.names, fields, path, "columns")
            table = file.read(columns=names)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    return list(zip(*(values(table, name) for name in names), strict=True))


def _read_tfds(path: Path, fields: Sequence[str]) -> list[Row]:
    if not dataset.is_prepared(path):
        raise InputError(
            f"{path} has no dataset_info.json; give the folder of one version of a tfds dataset, "
            "such as name/1.0.0"
        )
    import tensorflow_datasets as tfds

    builder = dataset.open_builder(path)
    features = builder.info.features
    texts = [name for name in features if isinstance(features[name], tfds.features.Text)]
    names = _pick_names(texts, fields, path, "text features")
    if not builder.info.splits:
        raise InputError(f"{path} has no split: is the dataset complete?")
    splits = builder.info.splits
    split = dataset.SPLIT if dataset.SPLIT in splits else next(iter(splits))
    # Of each record only the text is parsed: decoding images would need other packages.
    only_text = tfds.features.FeaturesDict({name: features[name] for name in names})
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    with dataset.reading(path):
        source = builder.as_data_source(split=split, deserialize_method=raw)
        records = [only_text.deserialize_example_np(record) for record in source]
    return [tuple(record[name].decode("utf-8") for name in names) for record in records]


_READERS: dict[str, Callable[[Path, Sequence[str]], list[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# What messages count in a file; in a parquet file and a tfds folder they count rows.
_COUNTED = {".txt": "line", ".jsonl": "line", ".json": "item"}


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if "\0" in text:  # UTF-16 without its byte order mark decodes without an error
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_json(text: str, path: Path, line: int) -> object:
    """Parse text that starts at that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise InputError(f"{where}: broken JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise InputError(f"{path}, line {line}: {error}") from None


def _row_of(item: object, fields: Sequence[str], where: str) -> Row:
    if not isinstance(item, dict):
        if fields:
            raise InputError(f"{where}: no field {fields[0]!r}: it is no object")
        return (_text_of(item, where),)
    return tuple(_text_of(item[name], where) for name in _pick_names(item, fields, where, "fields"))


def _text_of(item: object, where: str) -> str:
    if not isinstance(item, str):
        raise InputError(f"{where}: expected a prompt as text, found {type(item).__name__}")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud83d"
        raise InputError(f"{where}: the prompt holds half of a surrogate pair") from None
    return item


def _pick_names(
    names: Sequence[str] | Mapping[str, object], fields: Sequence[str], where: object, kind: str
) -> list[str]:
    """Return the name of the prompt, and `fields`; raise InputError for one that is missing."""
    found = ", ".join(map(str, names)) or "none"
    prompt = next((name for name in TEXT_NAMES if name in names), None)
    if prompt is None:
        raise InputError(f"{where}: no {' or '.join(TEXT_NAMES)} among the {kind} ({found})")
    for field in fields:
        if field not in names:
            raise InputError(f"{where}: no {field} among the {kind} ({found}); a reward reads it")
    return [prompt, *fields]
