"""Config files of published networks: those that the package carries, and some more."""

import json
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def config_of(name: str) -> dict[str, Any]:
    """Of r0_jax/stand_ins/published ("stable_diffusion_xl/unet") or of tests/data/configs."""
    path = TESTS.parent / "r0_jax" / "stand_ins" / "published" / name / "config.json"
    path = path if path.exists() else TESTS / "data" / "configs" / f"{name}.json"
    return json.loads(path.read_text("utf-8"))
