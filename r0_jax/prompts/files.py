"""Prompts from a user's file: text, JSON, parquet, or a tfds dataset."""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r0_jax import machine, remote
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular, kind_of, loads
from r0_jax.prompts import dataset

TEXT_NAMES = ("prompt", "caption", "text")  # of a field, a column or a feature; the first counts
_MOST_BYTES = 8 * 2**30  # of a text or JSON file
_MOST_ROWS = 10**8  # of a parquet file
_MOST_CHARACTERS = 100_000  # of a prompt; encoders read a few hundred
# Control characters but white space, and the byte order mark, also where files were joined.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")


def read_prompts(path: str | Path, numbered: bool = False) -> list[str]:
    """Read prompts, in order, from a `.txt`, `.jsonl`, `.json` or `.parquet` file or a tfds folder.

    Text holds one prompt a line. JSON holds strings, or objects with "prompt", "caption" or "text".
    Parquet and tfds have a column of such a name; of a tfds folder the split "train" is read, else
    the first. Blank prompts are skipped. Duplicates stay: users repeat a prompt to weight it.
    Control characters and byte order marks are left out, with a warning. Raises `InputError` that
    names the line, and for a text file that is something else, such as HTML. With `numbered`,
    images belong to prompts by number: then a blank prompt between others is an error, since it
    would shift them.
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
    for inside in path.iterdir() if path.is_dir() else ():
        check_regular(inside)
    try:
        found = (_read_tfds if path.is_dir() else _READERS[path.suffix])(path)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:  # parquet and tfds hold any bytes
        raise InputError(f"{path}: a prompt is not UTF-8: {error.object[:40]!r}") from None
    prompts = [prompt.strip() for prompt in _checked(found, path)]
    kept = [prompt for prompt in prompts if prompt]
    if not kept:
        raise InputError(f"{path} has no prompts")
    if numbered and any(prompts[len(kept) :]):  # or all blank ones are at the end
        where = f"{_counted(path)} {prompts.index('') + 1}"
        raise InputError(
            f"{path}, {where} is blank, so it is unclear which images belong to the prompts after "
            "it: remove it (r0_jax.sample skips it too)"
        )
    return kept


def _checked(prompts: list[str], path: Path) -> list[str]:
    """Apply the one rule for the characters and the length of prompts of any file."""
    cleaned, first = [], None
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > _MOST_CHARACTERS:
            raise InputError(
                f"{path}, {_counted(path)} {number}: {len(prompt)} characters are no prompt (at "
                f"most {_MOST_CHARACTERS})"
            )
        if _CONTROL.search(prompt):
            if "\0" in prompt:
                raise InputError(
                    f"{path}, {_counted(path)} {number}: the prompt holds a NUL character: is the "
                    "file damaged?"
                )
            first = first or number
            prompt = _CONTROL.sub(lambda found: "" if found[0] == "\ufeff" else " ", prompt)
        cleaned.append(prompt)
    if first:
        count = sum(a is not b for a, b in zip(prompts, cleaned, strict=True))
        warnings.warn(
            f"{path}: control characters or byte order marks are left out of {count} prompt(s), "
            f"first in {_counted(path)} {first}",
            stacklevel=3,
        )
    return cleaned


def _read_txt(path: Path) -> list[str]:
    text = _read_text(path)
    if kind := _foreign(text):
        raise InputError(f"{path} is not a list of prompts but {kind}")
    # splitlines() would also split at characters that a prompt may contain.
    return text.split("\n")


def _foreign(text: str) -> str | None:
    """Return what a text file is that holds no prompts, a line each, and what to do; else None."""
    start = text[:1000].lstrip()
    if re.match(r"<(!doctype|html|\?xml)\b", start, re.IGNORECASE):
        return "a web page: download the file itself, such as its raw form"
    first, *others = (line.strip() for line in text[:100_000].split("\n", 2))
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


def _read_jsonl(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        blank = not line.strip()  # kept, so that messages name the right line
        prompts.append(
            "" if blank else _prompt_of(_parse_json(line, path, number), f"{path}, line {number}")
        )
    return prompts


def _read_json(path: Path) -> list[str]:
    items = _parse_json(_read_text(path), path, 1)
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list, found {kind_of(items)}")
    return [_prompt_of(item, f"{path}, item {i}") for i, item in enumerate(items, start=1)]


def _read_parquet(path: Path) -> list[str]:
    import pyarrow  # slow to import, and only this format needs it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"{path} has more than {_MOST_ROWS} rows: split it")
            name = _pick_name(file.schema_arrow.names, path, "columns")
            table = file.read(columns=[name])  # all columns of that name; the first counts
            values = table.column(table.column_names.index(name)).to_pylist()
    except InputError:
        raise
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        if machine.problem(error):
            raise
        raise InputError(
            f"{path}: not a parquet file, or not a whole one: download it again"
        ) from None
    blank = ("" if value is None else value for value in values)
    return [_prompt_of(value, f"{path}, row {i}") for i, value in enumerate(blank, start=1)]


def _read_tfds(path: Path) -> list[str]:
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
    try:
        with dataset.reading(path):
            source = builder.as_data_source(split=split, deserialize_method=raw)
            texts = [only_text.deserialize_example_np(record)[name] for record in source]
        return [text.decode("utf-8") for text in texts]
    except (InputError, UnicodeDecodeError):
        raise
    except Exception as error:  # of a record that is cut short, array_record gives nothing at all
        if machine.problem(error):
            raise
        raise InputError(f"{path} cannot be read: is the dataset complete?") from None


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
# What messages count in a file; in a parquet file and a tfds folder they count rows.
_COUNTED = {".txt": "line", ".jsonl": "line", ".json": "item"}


def _counted(path: Path) -> str:
    return _COUNTED.get(path.suffix, "row")


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


def _prompt_of(item: object, where: str) -> str:
    if isinstance(item, dict):
        name = _pick_name(item, where, "fields")
        item = item[name]
    if not isinstance(item, str):
        raise InputError(f"{where}: expected a prompt as text, found {kind_of(item)}")
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
