"""Prompts from a user's file: text, JSON, parquet, or a tfds dataset."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from r0_jax import machine, remote
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular, kind_of, loads
from r0_jax.prompts import dataset
from r0_jax.prompts.characters import Row, cleaned

PROMPT = "prompt"
TEXT_NAMES = (PROMPT, "caption", "text")  # of a field, a column or a feature; the first counts
_MOST_BYTES = 8 * 2**30  # of a .json file, which is parsed as a whole
_MOST_LINE = 64 * 2**20  # bytes of a line of text or of .jsonl
_HEAD = 100_000  # bytes of a text file that tell what it is
_MOST_JSON = 64 * 2**20  # bytes of a text file that are tried as JSON
_MOST_ROWS = 10**8  # of a parquet file


def read_prompts(path: str | Path, numbered: bool = False, count: int | None = None) -> list[str]:
    """Read prompts, in order, from a `.txt`, `.jsonl`, `.json` or `.parquet` file or a tfds folder.

    Text holds one prompt a line. JSON holds strings, or objects with "prompt", "caption" or "text".
    Parquet and tfds have a column of such a name; of a tfds folder the split "train" is read, else
    the first. Blank prompts are skipped. Duplicates stay: users repeat a prompt to weight it.
    Control characters and byte order marks are left out, with a warning. Raises `InputError` that
    names the line, and for a text file that is something else, such as HTML. With `numbered`,
    images belong to prompts by number: then a blank prompt between others is an error, since it
    would shift them. With `count`, only the file's first prompts are read.
    """
    if not numbered:
        return list(itertools.islice(stream_prompts(path), count))
    path = _checked(path)
    prompts = [prompt for (prompt,) in _stripped(path, ())]
    kept = [prompt for prompt in prompts if prompt]
    if not kept:
        raise InputError(f"{path} has no prompts")
    if any(prompts[len(kept) :]):  # or all blank ones are at the end
        raise InputError(
            f"{_place(path, prompts.index('') + 1)} is blank, so it is unclear which images belong "
            "to the prompts after it: remove it (r0_jax.sample skips it too)"
        )
    return kept


def read_texts(
    path: str | Path, fields: Sequence[str] = (), count: int | None = None
) -> dict[str, list[str]]:
    """Read prompts as `read_prompts` does, and further text `fields` of theirs.

    Returns {"prompt": [...], field: [...], ...}, lists of one length. Raises `InputError` where a
    prompt has no such field, or a blank one.
    """
    return texts_of(itertools.islice(stream_rows(path, fields), count), fields)


def texts_of(rows: Iterable[Row], fields: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of one or more rows by their names, as `read_texts` does."""
    return dict(zip((PROMPT, *fields), map(list, zip(*rows, strict=True)), strict=True))


def stream_prompts(path: str | Path) -> Iterator[str]:
    """Yield the prompts that `read_prompts` returns, without holding the file in memory.

    Only `.json` is one value, which is parsed as a whole.
    """
    for (prompt,) in stream_rows(path):
        yield prompt


def stream_rows(path: str | Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the prompts of `stream_prompts`, each with the texts that `read_texts` adds."""
    path, is_empty = _checked(path), True
    for number, row in enumerate(_stripped(path, fields), start=1):
        if not row[0]:
            continue
        if not all(row):
            blank = fields[row.index("") - 1]
            raise InputError(f"{_place(path, number)}: the field {blank!r} is blank")
        is_empty = False
        yield row
    if is_empty:
        raise InputError(f"{path} has no prompts")


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
    for inside in path.iterdir() if path.is_dir() else ():
        check_regular(inside)
    return path


def _stripped(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yield all rows of a file, blank ones too, without the space around their texts."""
    try:
        read = _read_tfds if path.is_dir() else _READERS[path.suffix]
        for row in cleaned(read(path, fields), path, lambda number: f"{_counted(path)} {number}"):
            yield tuple(text.strip() for text in row)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:  # parquet and tfds hold any bytes
        raise InputError(f"{path}: a prompt is not UTF-8: {error.object[:40]!r}") from None


def _read_txt(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    if fields:
        raise InputError(
            f"{path} holds prompts alone, but a reward reads {fields[0]!r}: give a .jsonl, .json "
            "or .parquet file with such a field"
        )
    with path.open("rb") as file:
        head = file.read(_HEAD).decode("utf-8-sig", "replace")
        if head.lstrip()[:1] in ("[", "{"):  # it may be JSON, which ends where the file does
            head += file.read(_MOST_JSON).decode("utf-8", "replace")
    if kind := _foreign(head):
        raise InputError(f"{path} is not a list of prompts but {kind}")
    for line in _read_lines(path):
        yield (line,)


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file; they end at "\\n", "\\r\\n" or "\\r" only.

    Other characters that `str.splitlines` knows may be part of a prompt.
    """
    with path.open("rb") as file:
        for number in itertools.count(1):
            if not (data := file.readline(_MOST_LINE + 1)):
                return
            if len(data) > _MOST_LINE:
                raise InputError(f"{path}, line {number}: longer than {_MOST_LINE // 2**20} MiB")
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


def _foreign(text: str) -> str | None:
    """Return what a text file is that holds no prompts, a line each, and what to do; else None."""
    start = text[:1000].lstrip()
    if re.match(r"<(!doctype|html|\?xml)\b", start, re.IGNORECASE):
        return "a web page: download the file itself, such as its raw form"
    first, *others = (line.strip() for line in text[:_HEAD].split("\n", 2))
    if start[:1] in ("[", "{"):
        for whole, suffix in ((text.strip(), ".json"), (first, ".jsonl")):
            if whole[-1:] in ("]", "}") and _is_json(whole):
                return f"JSON: give its name the suffix {suffix}"
    for separator in ",\t;":
        cells = [cell.strip(" \"'").lower() for cell in first.split(separator)]
        if (
            len(cells) > 1
            and any(name in cells for name in TEXT_NAMES)
            and all(re.fullmatch(r"[\w.-]*", cell) for cell in cells)
            and all(separator in line for line in others[:1])
        ):
            return "a table with columns: write the prompts alone, one a line, or a .parquet file"
    return None


def _is_json(text: str) -> bool:
    try:
        return isinstance(loads(text), list | dict)
    except ValueError:
        return False


def _read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    blank = ("",) * (1 + len(fields))  # kept, so that messages name the right line
    for number, line in enumerate(_read_lines(path), start=1):
        if line.strip():
            yield _row_of(_parse_json(line, path, number), fields, f"{path}, line {number}")
        else:
            yield blank


def _read_json(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    items = _parse_json(_read_text(path), path, 1)
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list, found {kind_of(items)}")
    for number, item in enumerate(items, start=1):
        yield _row_of(item, fields, f"{path}, item {number}")


def _read_parquet(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow  # slow to import, and only this format needs it
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"{path} has more than {_MOST_ROWS} rows: split it")
            names = _pick_names(file.schema_arrow.names, fields, path, "columns")
            for part in file.iter_batches(columns=names):  # all of a name; the first counts
                places = (part.schema.names.index(name) for name in names)
                columns = (part.column(place).to_pylist() for place in places)
                for row in zip(*columns, strict=True):
                    number += 1
                    where = f"{path}, row {number}"
                    yield tuple("" if x is None else _text_of(x, where) for x in row)
    except (InputError, UnicodeDecodeError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        if machine.problem(error):
            raise
        raise InputError(
            f"{path}: not a parquet file, or not a whole one: download it again"
        ) from None


def _read_tfds(path: Path, fields: Sequence[str]) -> Iterator[Row]:
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
    try:
        with dataset.reading(path):
            source = builder.as_data_source(split=split, deserialize_method=raw)
            for record in source:
                found = only_text.deserialize_example_np(record)
                yield tuple(found[name].decode("utf-8") for name in names)
    except (InputError, UnicodeDecodeError):
        raise
    except Exception as error:  # of a record that is cut short, array_record gives nothing at all
        if machine.problem(error):
            raise
        raise InputError(f"{path} cannot be read: is the dataset complete?") from None


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# What messages count in a file; in a parquet file and a tfds folder they count rows.
_COUNTED = {".txt": "line", ".jsonl": "line", ".json": "item"}


def _counted(path: Path) -> str:
    return _COUNTED.get(path.suffix, "row")


def _place(path: Path, number: int) -> str:
    return f"{path}, {_counted(path)} {number}"


def _read_text(path: Path) -> str:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise InputError(
            f"{path} has {size / 2**30:.1f} GiB, more than {_MOST_BYTES // 2**30}: split it"
        )
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
        return loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise InputError(f"{where}: broken JSON: {error.msg} (column {error.colno})") from None
    except ValueError:  # a number of 5,000 digits, a thousand brackets
        raise InputError(
            f"{path}, line {line}: a number is too long or brackets are nested too deeply"
        ) from None


def _row_of(item: object, fields: Sequence[str], where: str) -> Row:
    if not isinstance(item, dict):
        if fields:
            raise InputError(f"{where}: no field {fields[0]!r}: it is no object")
        return (_text_of(item, where),)
    return tuple(_text_of(item[name], where) for name in _pick_names(item, fields, where, "fields"))


def _text_of(item: object, where: str) -> str:
    if not isinstance(item, str):
        raise InputError(f"{where}: expected a prompt as text, found {kind_of(item)}")
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
