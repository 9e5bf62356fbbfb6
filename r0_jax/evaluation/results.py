"""What an evaluation leaves in a folder: its table, the values behind it, and what is shown."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r0_jax.files import write_bytes

VALUES = "eval_values.npz"  # "MODEL/METRIC": a value a prompt
FEATURES = "features"  # of images in VALUES, for the Frechet distance; "reference" has the scenes
IMAGES = Path("samples") / "eval"  # of the prompts that the report shows
SHOWN = 12  # prompts at most


def write(
    folder: Path,
    table: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    files: Mapping[str, Sequence[str]],
) -> None:
    """Write `folder`/eval.json last: where it is, the rest is whole.

    Args:
      values: {"MODEL/METRIC": a value a prompt}, and whatever else the differences are made from.
      prompts: the first `SHOWN` of them are listed.
      files: {model: its image of each of these}, as paths from `IMAGES`.
    """
    file = io.BytesIO()
    np.savez_compressed(file, **values)
    write_bytes(folder / VALUES, file.getvalue())
    lines = [
        json.dumps(
            {
                "index": i,
                "prompt": prompt,
                "files": {name: paths[i] for name, paths in files.items()},
            },
            ensure_ascii=False,
        )
        for i, prompt in enumerate(prompts[:SHOWN])
    ]
    text = "\n".join(lines) + "\n"
    write_bytes(folder / IMAGES / "prompts.jsonl", text.encode("utf-8", "replace"))
    whole = json.dumps(_finite(table), indent=1, allow_nan=False)
    write_bytes(folder / "eval.json", whole.encode("utf-8"))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, at any depth: JSON has neither."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
