"""Whether two sides took the same first step."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from benchmarks.step.turns import First

TOLERANCE = 1e-3
GRADIENT = "gradient"
_CHECKED = ("train/loss", "norm/grads", "reward/", "norm/reward_grads/", "norm/x0/")


class Agreement(NamedTuple):
    """How far apart two first steps are, as shares of ours.

    Attributes:
      apart: of each metric, and the distance of the whole gradients; infinite where one is missing.
    """

    apart: dict[str, float]

    @property
    def worst(self) -> str:
        """Return the name of the largest difference."""
        return max(self.apart, key=lambda name: self.apart[name])

    @property
    def holds(self) -> bool:
        """Return whether all differences are at most `TOLERANCE`."""
        return all(x <= TOLERANCE for x in self.apart.values())

    def __str__(self) -> str:
        worst = self.worst
        said = "the first steps agree" if self.holds else "the first steps DIFFER"
        return f"{said}: {worst} by {self.apart[worst]:.1e}"


def compare(ours: First, twin: First, folder: Path) -> Agreement:
    """Compare losses, scores, norms and whole gradients, whose files are in `folder`."""
    apart = {}
    for name, value in ours.metrics.items():
        if name.startswith(_CHECKED):
            other = twin.metrics.get(name, math.inf)
            # At x0 the unit is the pull of the rewards, whose norm is 1. At first the generator is
            # the base, so that `output` pulls by rounding errors only.
            unit = 1.0 if name.startswith("norm/x0/") else 1e-12
            apart[name] = _finite(abs(other - value) / max(abs(value), unit))
    apart[GRADIENT] = distance(*(load_file(folder / x.gradient) for x in (ours, twin)))
    return Agreement(apart)


def distance(ours: dict[str, np.ndarray], twin: dict[str, np.ndarray]) -> float:
    """Return the distance of two gradients as a share of the norm of ours."""
    if ours.keys() != twin.keys():
        return math.inf
    apart = sum(float(np.sum((x - twin[name]) ** 2.0)) for name, x in ours.items())
    size = sum(float(np.sum(x**2.0)) for x in ours.values())
    return _finite(math.sqrt(apart / size))


def _finite(x: float) -> float:
    return x if math.isfinite(x) else math.inf  # NaN would compare as smaller than anything
