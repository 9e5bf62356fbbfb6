"""What a client has made of a network's weights, against the run's own adapters.

Clients run this: it imports nothing but NumPy and safetensors. A client's names are not needed. All
weights are random, so a weight is known by its first numbers.
"""

import math

import numpy as np
from safetensors import safe_open

_FIRST = 48  # numbers by which a weight is known


class Deltas:
    """Collect what became of every adapted weight.

    `base` is the file of the pretrained network, `adapters` that of MODULE.A and MODULE.B.
    """

    def __init__(self, base, adapters):
        self._base = safe_open(base, framework="numpy")
        self._adapters = safe_open(adapters, framework="numpy")
        self.modules = {key.removesuffix(".A") for key in self._adapters.keys() if key[-2:] == ".A"}
        self._names, self._seen, self._places = {}, set(), {}
        self.error = self.largest = 0.0
        for key in self._base.keys():
            if key.endswith(".weight"):
                part = self._base.get_slice(key)
                if len(part.get_shape()) > 1:
                    self._names[_first(part[:1])] = key.removesuffix(".weight")

    def find(self, key, weight):
        """Note which modules' pretrained weights a client holds, one after another, in `weight`."""
        row, found = 0, []
        while weight.ndim > 1 and row < len(weight):
            module = self._names.get(_first(weight[row : row + 1]))
            rows = self._base.get_slice(f"{module}.weight").get_shape()[0] if module else 0
            if not rows or row + rows > len(weight):
                break
            found.append((module, row, row + rows))
            row += rows
        if found:
            self._places[key] = found

    def take(self, key, weight):
        """Compare the weight that a client has in the end; `find` saw the pretrained one."""
        for module, start, end in self._places.get(key, ()):
            base = self._base.get_tensor(f"{module}.weight").astype(np.float64)
            base = base.reshape(len(base), -1)
            found = weight[start:end].astype(np.float64).reshape(base.shape) - base
            expected = np.zeros_like(base)
            if module in self.modules:
                a, b = (self._adapters.get_tensor(f"{module}.{x}").astype(np.float64) for x in "AB")
                rank = len(a)
                expected = b.reshape(-1, rank) @ a.reshape(rank, -1)
                self._seen.add(module)
                self.largest = max(self.largest, float(np.abs(expected).max()))
            self.error = max(self.error, float(np.abs(found - expected).max()))
            if not math.isfinite(self.error):
                raise SystemExit(f"{module} is not finite in {key}")

    def result(self):
        """Return the JSON object of a check; "absent" are modules that the client has not got."""
        return {
            "modules": len(self.modules),
            "absent": sorted(self.modules - self._seen),
            "error": self.error,
            "largest": self.largest,
        }


def tensors(path):
    """Yield the keys and tensors of a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        for key in file.keys():
            yield key, file.get_tensor(key)


def keys(path):
    """Return the keys of a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def _first(rows):
    return np.asarray(rows).reshape(-1)[:_FIRST].astype(np.float16).tobytes()
