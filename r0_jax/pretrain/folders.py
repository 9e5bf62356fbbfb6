"""Writes the small files of diffusers and transformers folders."""

import json
import shutil
from pathlib import Path
from typing import Any

from r0_jax.files import write_bytes


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, in the layout of diffusers."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files into a model's folder, where transformers looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, folder / path.name)
