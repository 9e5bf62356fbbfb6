"""The licence of a pretrained pipeline, as its own model card says it."""

import warnings
from pathlib import Path

import yaml

from r0_jax.files import check_link, check_regular

FIELDS = ("license", "license_name", "license_link")
_LONGEST_CARD = 1 << 20  # bytes
_LONGEST_FIELD = 300  # characters


def of_folder(folder: Path) -> dict[str, str]:
    """Return the licence fields of the Hub in the folder's README.md; {} where there are none.

    A README.md that is no readable model card warns: its licence cannot be carried over.
    """
    path = folder / "README.md"
    if not path.exists():
        return {}
    check_link(path, folder)
    check_regular(path)
    try:
        with path.open("rb") as file:
            lines = file.read(_LONGEST_CARD).decode("utf-8-sig").splitlines()
        if not lines or lines[0].strip() != "---":
            return {}  # a text without metadata
        fields = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
        if not isinstance(fields, dict):
            raise ValueError("its front matter is not a list of fields")
    except (ValueError, yaml.YAMLError, RecursionError):
        warnings.warn(
            f"the front matter of {path} is invalid, so the new model card names no licence; add "
            "the licence of the pretrained model to it",
            stacklevel=2,
        )
        return {}
    return {name: fields[name] for name in FIELDS if _is_plain(fields.get(name))}


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_FIELD
