"""TPU slices by name, there or not: their shape for the compiler, and what a chip can do.

The figures of a chip are from Google's documentation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e).
A chip's share of the network between slices is that of its host, divided by the host's chips.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from r0_jax.errors import InputError

_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """Say what bounds a program.

    Attributes:
      hbm_bytes: memory that a program can use, as the compiler says when it runs out.
      flops: operations a second of bfloat16 matrix products.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that a chip sends to its neighbours, all links together.
      dcn_bandwidth: bytes a second to other slices; None where it is not published.
      cores: how many the slice's name counts for one chip.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None
    cores: int


CHIPS = {
    "v4": Chip("v4", 30.75 * 2**30, 275e12, 1228 * _GB, 300 * _GB, None, cores=2),
    "v5e": Chip("v5e", 15.75 * 2**30, 197e12, 819 * _GB, 200 * _GB, 3.125 * _GB, cores=1),
    "v5p": Chip("v5p", 95.74 * 2**30, 459e12, 2765 * _GB, 600 * _GB, 6.25 * _GB, cores=2),
    "v6e": Chip("v6e", 31.25 * 2**30, 918e12, 1638 * _GB, 400 * _GB, 12.5 * _GB, cores=1),
}
# Chips of a slice -> its shape; chips have neighbours in two dimensions, or in three.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}


def find(name: str) -> tuple[Chip, list[Any]]:
    """Return the chip and the abstract devices of a slice, by its name on Google Cloud.

    "v5e-16" has 16 chips, "v5p-8" (8 cores) has 4, and "2xv5e-16" is two slices.
    Raises InputError for a name that is unknown, and where libtpu is not installed.
    """
    plain = name.replace("v5litepod-", "v5e-")  # as gcloud has it
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(v\d[ep]?)-(\d+)", plain)
    if not match or match[2] not in CHIPS:
        raise InputError(
            f"--topology={name} is unknown: use a TPU slice such as v5e-16, v5p-8, "
            f"v6e-8 or 2xv5e-16 (known chips: {', '.join(CHIPS)}), or cpu or local, "
            "which measure here"
        )
    chip, shapes = CHIPS[match[2]], _CUBIC if CHIPS[match[2]].cores == 2 else _FLAT
    count, rest = divmod(int(match[3]), chip.cores)
    if rest or count not in shapes:
        known = ", ".join(f"{chip.name}-{n * chip.cores}" for n in shapes)
        raise InputError(f"--topology={name} is not known here; known are {known}")
    return chip, _devices(chip, shapes[count], int(match[1] or 1))


def _devices(chip: Chip, shape: str, slices: int) -> Sequence[Any]:
    # Otherwise the compiler asks the cloud for its machine, and locks out other processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    # Both cores of a v4 make one device, as they always do in a v5p.
    more = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if shape == "1x1":
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(
                topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{chip.name}:{shape}", num_slices=slices, **more
                ).devices
            )
    except (jax.errors.JaxRuntimeError, RuntimeError, ImportError) as error:
        said = str(error).splitlines()[0][:200]
        raise InputError(
            f"the TPU compiler cannot be used: pip install 'r0_jax[tpu]' ({said})"
        ) from None
