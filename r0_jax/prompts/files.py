"""Prompts from a user's file: text, tables, JSON, parquet, or a tfds dataset."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular, kind_of
from r0_jax.prompts.characters import Row, cleaned
from r0_jax.prompts.formats import READERS, TEXT_NAMES, Item, read_tfds

PROMPT = "prompt"
SUFFIXES = tuple(READERS)

Record = Mapping[str, object]  # all fields of a prompt


def read_prompts(path: str | Path, numbered: bool = False, count: int | None = None) -> list[str]:
    """Read prompts, in order, from a file of one of `SUFFIXES`, or a tfds folder.

    Text holds one prompt a line. JSON holds strings, or objects with "prompt", "caption" or "text".
    The others have a column of such a name; the first line of `.csv` and `.tsv` names the columns.
    Of a tfds folder the split "train" is read, else the first. Blank prompts are skipped.
    Duplicates stay: users repeat a prompt to weight it. Control characters and byte order marks
    are left out, with a warning. Raises `InputError` that names the line, and for a text file that
    is something else, such as HTML. With `numbered`, images belong to prompts by number: then a
    blank prompt between others is an error, since it would shift them. With `count`, only the
    file's first prompts are read.
    """
    if not numbered:
        return list(itertools.islice(stream_prompts(path), count))
    path = _checked(path)
    prompts = [prompt for _, (prompt,) in _stripped(path)]
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
    for number, (_, row) in enumerate(_stripped(path, fields), start=1):
        if not row[0]:
            continue
        if not all(row):
            blank = fields[row.index("") - 1]
            raise InputError(f"{_place(path, number)}: the field {blank!r} is blank")
        is_empty = False
        yield row
    if is_empty:
        raise InputError(f"{path} has no prompts")


def stream_records(path: str | Path, column: str | None = None) -> Iterator[tuple[str, Record]]:
    """Yield the prompts of `stream_prompts`, each with its record: {} for a prompt alone.

    `column` names the prompt's field or column, in place of "prompt", "caption" or "text".
    """
    path, is_empty = _checked(path), True
    for item, (prompt,) in _stripped(path, (), column, whole=True):
        if prompt:
            is_empty = False
            yield prompt, item if isinstance(item, Mapping) else {}
    if is_empty:
        raise InputError(f"{path} has no prompts")


def _checked(path: str | Path) -> Path:
    """Return where a file or folder of prompts lies; raise InputError if it cannot be one."""
    path = remote.local(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    check_regular(path)
    if not path.is_dir() and path.suffix not in READERS:
        raise InputError(
            f"{path}: cannot read prompts from {path.suffix or 'a file without suffix'}; give "
            f"{', '.join(READERS)} or a tfds folder"
        )
    check_not_pointer(path)
    for inside in path.iterdir() if path.is_dir() else ():
        check_regular(inside)
    return path


def _pick(
    fields: Sequence[str],
    column: str | None,
    path: Path,
    whole: bool,
    names: Sequence[str],
    kind: str,
) -> Sequence[str]:
    """Return which of a file's columns are read: all where `whole`."""
    asked = _pick_names(names, fields, column, path, kind)
    return list(dict.fromkeys(names)) if whole else asked


def _stripped(
    path: Path, fields: Sequence[str] = (), column: str | None = None, whole: bool = False
) -> Iterator[tuple[Item, Row]]:
    """Yield all items of a file, blank ones too, with their texts without the space around them.

    With `whole`, an item has all fields, not those alone that are asked for.
    """

    pick = functools.partial(_pick, fields, column, path, whole)
    try:
        read = read_tfds if path.is_dir() else READERS[path.suffix]
        items, again = itertools.tee(read(path, pick))
        rows = (
            _row_of(item, fields, column, _place(path, number))
            for number, item in enumerate(items, start=1)
        )
        # The rows come first, since their end may warn.
        found = cleaned(rows, path, lambda number: f"{_counted(path)} {number}")
        for row, item in zip(found, again, strict=False):
            yield item, tuple(text.strip() for text in row)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:  # parquet and tfds hold any bytes
        raise InputError(f"{path}: a prompt is not UTF-8: {error.object[:40]!r}") from None


# What messages count in a file; in tables and a tfds folder they count rows.
_COUNTED = {".txt": "line", ".jsonl": "line", ".json": "item"}


def _counted(path: Path) -> str:
    return _COUNTED.get(path.suffix, "row")


def _place(path: Path, number: int) -> str:
    return f"{path}, {_counted(path)} {number}"


def _row_of(item: Item, fields: Sequence[str], column: str | None, where: str) -> Row:
    if isinstance(item, Mapping):
        names = _pick_names(item, fields, column, where, "fields")
        return tuple(_text_of(item[name], where) for name in names)
    prompt = _text_of(item, where)
    if (asked := column or next(iter(fields), None)) and prompt.strip():
        raise InputError(
            f"{where}: no field {asked!r}: it is a prompt alone, "
            "so give a file with fields, such as .jsonl"
        )
    return (prompt, *("" for _ in fields))


def _text_of(item: object, where: str) -> str:
    if not isinstance(item, str):
        raise InputError(f"{where}: expected a prompt as text, found {kind_of(item)}")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud83d"
        raise InputError(f"{where}: the prompt holds half of a surrogate pair") from None
    return item


def _pick_names(
    names: Sequence[str] | Record,
    fields: Sequence[str],
    column: str | None,
    where: object,
    kind: str,
) -> list[str]:
    """Return the name of the prompt, and `fields`; raise InputError for one that is missing."""
    found = ", ".join(map(str, names)) or "none"
    asked = TEXT_NAMES if column is None else (column,)
    prompt = next((name for name in asked if name in names), None)
    if prompt is None:
        raise InputError(f"{where}: no {' or '.join(asked)} among the {kind} ({found})")
    for field in fields:
        if field not in names:
            raise InputError(f"{where}: no {field} among the {kind} ({found}); a reward reads it")
    return [prompt, *fields]
