"""The one rule for the characters of prompts, whatever file they come from."""

import collections
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from r0_jax.errors import InputError

Row = tuple[str, ...]  # a prompt, and further texts of its record

_MOST = 100_000  # characters of a prompt; encoders read a few hundred
# Control characters but white space, and the byte order mark, also where files were joined.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
# Two bytes of GBK, Big5, EUC or Shift JIS are now and then two bytes of UTF-8: letters of a
# handful of scripts, by chance. No language writes two of these scripts in one word.
_SCRIPTS = (
    "\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af",  # Latin, beyond ASCII
    "\u0370-\u0373\u0376-\u037d\u0386\u0388-\u03ff",  # Greek
    "\u0400-\u0481\u0483-\u052f",  # Cyrillic
    "\u0531-\u0559\u0561-\u0587",  # Armenian
    "\u0591-\u05bd\u05c1\u05c2\u05c7-\u05f2",  # Hebrew
    "\u0620-\u065f\u066e-\u06d3\u06d5-\u07ff",  # Arabic and others
)
_ACCENTS = "\u0300-\u036f"  # of Latin, Greek and Cyrillic letters
_OTHERS = "".join(_SCRIPTS[3:])
_MISREAD = re.compile(
    "|".join(
        [
            *(f"[{one}][{''.join(_SCRIPTS).replace(one, '')}]" for one in _SCRIPTS),
            f"[{_ACCENTS}][{_OTHERS}]",
            f"[{_OTHERS}][{_ACCENTS}]",
            "\ufffd",  # what programs leave of text that they cannot read; and the same as GBK
            "锟斤拷",
        ]
    )
)
_SAID = {
    _CONTROL: "control characters or byte order marks are left out of {} prompt(s), first in {}",
    _MISREAD: "{} prompt(s) look like text of another encoding such as GBK, first in {}: if they "
    "are, save the file as UTF-8",
}


def cleaned(rows: Iterable[Row], path: Path, place: Callable[[int], str]) -> Iterator[Row]:
    """Yield rows without control characters and byte order marks, and warn of them.

    It also warns of text that seems to be in another encoding than UTF-8. `place` says where the
    row of a number is, such as "line 3". Raises InputError for a prompt with a NUL character or
    with more than 100,000 characters.
    """
    counts: collections.Counter[re.Pattern[str]] = collections.Counter()
    first: dict[re.Pattern[str], str] = {}
    try:
        for number, row in enumerate(rows, start=1):
            if any(len(text) > _MOST or "\0" in text for text in row):
                raise InputError(f"{path}, {place(number)}: {_problem(row)}")
            for found in _CONTROL, _MISREAD:
                if any(map(found.search, row)):
                    counts[found] += 1
                    first.setdefault(found, place(number))
            yield tuple(_CONTROL.sub(_replacement, text) for text in row) if first else row
    finally:  # also where a reader wants the first prompts alone
        for found, where in first.items():
            said = _SAID[found].format(counts[found], where)
            warnings.warn(
                f"{path}: {said}", stacklevel=1
            )  # one place: a file read twice is told once


def _problem(row: Row) -> str:
    longest = max(map(len, row))
    if longest > _MOST:
        return f"{longest} characters are no prompt (at most {_MOST})"
    return "the prompt holds a NUL character: is the file damaged?"


def _replacement(control: re.Match[str]) -> str:
    return "" if control[0] == "\ufeff" else " "
