"""Which image of a folder belongs to which prompt, by its name."""

import collections
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from r0_jax.errors import InputError
from r0_jax.prompts import files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Item(NamedTuple):
    """An image to score."""

    path: Path
    prompt: str


def list_images(folder: Path) -> list[Path]:
    """Return the images in a folder but its contact sheet, as people count: img_2 before img_10.

    Raises InputError where there are none.
    """
    if not folder.is_dir():
        raise InputError(f"--images={folder} is not a folder")
    found = sorted(
        (
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES
            and path.stem != "contact_sheet"
            and not path.name.startswith(".")
        ),
        key=_natural,
    )
    if not found:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return found


def pair(folder: Path, prompts: Sequence[str]) -> tuple[list[Item], list[str]]:
    """Return images with their prompts, and warnings of missing images.

    Raises InputError where names do not tell which prompt an image belongs to.
    """
    found = list_images(folder)
    others = [path for path in found if not re.fullmatch(r"\d+", path.stem)]
    if not others:
        by_number: dict[int, Path] = {}
        for path in found:
            if (other := by_number.setdefault(int(path.stem), path)) != path:
                raise InputError(f"{other.name} and {path.name} have the same number")
        extra = [path.name for number, path in by_number.items() if number >= len(prompts)]
        if extra:
            raise InputError(
                f"{folder / extra[0]} has no prompt: there are {len(prompts)}, counted from 0"
            )
        missing = [f"{i:05d}" for i in range(len(prompts)) if i not in by_number]
        return (
            [Item(by_number[i], prompts[i]) for i in sorted(by_number)],
            [f"image {name} is missing" for name in missing],
        )
    if len(found) != len(prompts):
        but = "" if len(others) == len(found) else f" ({others[0].name} is not)"
        raise InputError(
            f"{folder} holds {len(found)} images, but there are {len(prompts)} "
            f"prompts: name images by the number of their prompt, from 0{but}"
        )
    return [Item(*both) for both in zip(found, prompts, strict=True)], []


def read_listing(path: Path) -> list[Item]:
    """Return the images that a `prompts.jsonl` lists, with their prompts.

    A relative `image_path` begins in the folder of the list. Raises InputError for a line without.
    """
    found = []
    for prompt, record in files.stream_records(path):
        image = record.get("image_path")
        if not isinstance(image, str) or not image:
            raise InputError(f"{path}: the record of {prompt!r} has no image_path")
        found.append(Item(path.parent / image, prompt))
    return found


def doubt(items: Sequence[Item]) -> str | None:
    """Return a warning that tells which image got which prompt; None if there is no doubt.

    There is doubt about images that are paired in order, from the first whose name does not follow
    the one before: there is a gap between numbers, or a name without a number.
    """
    names = [re.fullmatch(r"(.*?)(\d*)", item.path.stem, re.DOTALL).groups() for item in items]
    if not any(prefix for prefix, _ in names):
        return None  # paired by number
    sizes = collections.Counter(prefix for prefix, number in names if number)
    rows = [prefix if number and sizes[prefix] > 1 else None for prefix, number in names]
    for i in range(1, len(items)):
        gap = rows[i] == rows[i - 1] is not None and int(names[i][1]) != int(names[i - 1][1]) + 1
        if gap or (rows[i] is None) != (rows[i - 1] is None):
            said = ", ".join(f"{item.path.name} with {item.prompt!r}" for item in items[i : i + 3])
            more = ", ... (see --out)" if items[i + 3 :] else ""
            return f"names are not numbered one by one, so images are paired in order: {said}{more}"
    return None


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people count: img_2 before img_10."""
    # Text and numbers alternate, so text is compared with text.
    parts = re.split(r"(\d+)", path.stem)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
