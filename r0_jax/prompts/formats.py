"""The formats of prompt files: from a file to its items, each a prompt alone or a whole record."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from r0_jax import machine
from r0_jax.errors import InputError
from r0_jax.files import kind_of, loads
from r0_jax.prompts import dataset

TEXT_NAMES = ("prompt", "caption", "text")  # of a field, a column or a feature; the first counts
Item = object  # a record {name: value}, or a prompt alone
Pick = Callable[[Sequence[str], str], Sequence[str]]  # (names, their kind) -> those to read
_MOST_BYTES = 8 * 2**30  # of a .json file, which is parsed as a whole
_MOST_LINE = 64 * 2**20  # bytes of a line of text or of .jsonl
_HEAD = 100_000  # bytes of a text file that tell what it is
_MOST_JSON = 64 * 2**20  # bytes of a text file that are tried as JSON
_MOST_ROWS = 10**8  # of a parquet file


def _read_txt(path: Path, pick: Pick) -> Iterator[Item]:
    with path.open("rb") as file:
        head = file.read(_HEAD).decode("utf-8-sig", "replace")
        if head.lstrip()[:1] in ("[", "{"):  # it may be JSON, which ends where the file does
            head += file.read(_MOST_JSON).decode("utf-8", "replace")
    if kind := _foreign(head):
        raise InputError(f"{path} is not a list of prompts but {kind}")
    yield from _read_lines(path)


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
            return "a table with columns: give its name the suffix .csv, or .tsv if tabs divide it"
    return None


def _is_json(text: str) -> bool:
    try:
        return isinstance(loads(text), list | dict)
    except ValueError:
        return False


def _read_table(path: Path, pick: Pick) -> Iterator[Item]:
    """Yield the rows of a .csv or .tsv file, with the quotes of spreadsheets."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        try:
            names = [name.strip() for name in next(rows, [])]
            pick(names, "columns")
            for number, cells in enumerate((row for row in rows if row), start=1):
                if len(cells) != len(names):
                    raise InputError(
                        f"{path}, row {number}: {len(cells)} cells, but the first line names "
                        f"{len(names)} columns: is a quote missing before line {rows.line_num}?"
                    )
                record: dict[str, str] = {}
                for name, cell in zip(names, cells, strict=True):
                    record.setdefault(name, cell)  # the first of a name counts
                yield record
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}: {error}") from None


def _read_jsonl(path: Path, pick: Pick) -> Iterator[Item]:
    for number, line in enumerate(_read_lines(path), start=1):
        # A blank line is kept, so that messages name the right line.
        yield _parse_json(line, path, number) if line.strip() else ""


def _read_json(path: Path, pick: Pick) -> Iterator[Item]:
    items = _parse_json(_read_text(path), path, 1)
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list, found {kind_of(items)}")
    yield from items


def _read_parquet(path: Path, pick: Pick) -> Iterator[Item]:
    import pyarrow  # slow to import, and only this format needs it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"{path} has more than {_MOST_ROWS} rows: split it")
            names = pick(file.schema_arrow.names, "columns")
            for part in file.iter_batches(columns=names):  # all of a name; the first counts
                places = (part.schema.names.index(name) for name in names)
                columns = (part.column(place).to_pylist() for place in places)
                for row in zip(*columns, strict=True):
                    texts = ("" if value is None else value for value in row)
                    yield dict(zip(names, texts, strict=True))
    except (InputError, UnicodeDecodeError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        if machine.problem(error):
            raise
        raise InputError(
            f"{path}: not a parquet file, or not a whole one: download it again"
        ) from None


def read_tfds(path: Path, pick: Pick) -> Iterator[Item]:
    if not dataset.is_prepared(path):
        raise InputError(
            f"{path} has no dataset_info.json; give the folder of one version of a tfds dataset, "
            "such as name/1.0.0"
        )
    import tensorflow_datasets as tfds

    builder = dataset.open_builder(path)
    features = builder.info.features
    texts = [name for name in features if isinstance(features[name], tfds.features.Text)]
    names = pick(texts, "text features")
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
                yield {name: found[name].decode("utf-8") for name in names}
    except (InputError, UnicodeDecodeError):
        raise
    except Exception as error:  # of a record that is cut short, array_record gives nothing at all
        if machine.problem(error):
            raise
        raise InputError(f"{path} cannot be read: is the dataset complete?") from None


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


READERS: dict[str, Callable[[Path, Pick], Iterator[Item]]] = {
    ".txt": _read_txt,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
