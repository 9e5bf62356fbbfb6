"""Prompts with their ids and the other fields of their records, as the files of benchmarks hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from r0_jax import remote
from r0_jax.errors import InputError
from r0_jax.files import kind_of
from r0_jax.prompts import dataset, files
from r0_jax.prompts.files import Record

FILE = "file"  # a field of prompts of a folder of files: the name of their file, without suffix


class Prompt(NamedTuple):
    """A prompt of a file.

    Attributes:
      text: the prompt itself.
      id: by which the user's file names it; None where it has no name.
      fields: all of its record.
    """

    text: str
    id: str | None
    fields: Record


def read(
    path: str | Path,
    column: str | None = None,
    id_column: str | None = None,
    ids: Sequence[str] = ("id",),
) -> list[Prompt]:
    """Read the prompts of a file that `files.read_prompts` reads, or of a folder of such files.

    In a folder each `.txt` file is one prompt, named by its file. Without any, each file of another
    format is a list of prompts. Prompts of both have the field `FILE`.

    Args:
      column: the prompt's field; None: "prompt", "caption" or "text".
      id_column: the field that names a prompt; None: the first of `ids` that it has.

    Raises:
      InputError: a column is missing, or an id is neither text nor a whole number.
    """
    path = remote.local(path)
    inside = _files_in(path)
    found: list[tuple[str, Record]] = []
    if any(file.suffix == ".txt" for file in inside):
        if column or id_column:
            raise InputError(
                f"{path} holds a prompt a file: --column and --id_column are for lists"
            )
        for file in inside:
            if file.suffix == ".txt":
                found.append(
                    (" ".join(files.stream_prompts(file)), {"id": file.stem, FILE: file.stem})
                )
    elif inside:
        for file in inside:
            rows = files.stream_records(file, column)
            found.extend((text, {**fields, FILE: file.stem}) for text, fields in rows)
    else:
        found.extend(files.stream_records(path, column))
    return [
        Prompt(text, _id_of(fields, id_column, ids, number, path), fields)
        for number, (text, fields) in enumerate(found)
    ]


def _files_in(path: Path) -> list[Path]:
    """Return the files of prompts in a folder that is no dataset, by name."""
    if not path.is_dir() or dataset.is_prepared(path):
        return []
    return sorted(file for file in path.iterdir() if file.suffix in files.SUFFIXES)


def _id_of(
    fields: Record, id_column: str | None, ids: Sequence[str], number: int, path: Path
) -> str | None:
    if id_column is not None and id_column not in fields:
        has = ", ".join(map(str, fields)) or "none"
        raise InputError(f"{path}, prompt {number}: no {id_column} among the fields ({has})")
    asked = [id_column] if id_column is not None else [name for name in ids if name in fields]
    if not asked:
        return None
    value = fields[asked[0]]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise InputError(
            f"{path}, prompt {number}: {asked[0]} should be text or a whole number, "
            f"not {kind_of(value) if value != '' else 'blank'}"
        )
    return str(value).strip()
