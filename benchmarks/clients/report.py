"""docs/reports/clients.md, from the results of the checks that are done."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import NamedTuple

from benchmarks.clients import checks, material
from benchmarks.clients.checks import CLOSE, CLOSE_COLOR, Check, Result
from benchmarks.clients.setting import FAMILIES, Places
from benchmarks.load import cpu
from benchmarks.measure import table
from r0_jax.files import write_bytes

_GIB = 2**30


class Title(NamedTuple):
    """What people call a client, and the flags that give it."""

    title: str
    flags: str


CLIENTS = {
    "diffusers": Title("diffusers", ""),
    "comfyui": Title("ComfyUI", "--comfyui=DIR --comfyui_python=FILE"),
    "sd_scripts": Title("sd-scripts", "--sd_scripts=DIR --sd_scripts_python=FILE"),
    "forge": Title("Forge", "--forge=DIR --forge_python=FILE"),
    "sdcpp": Title("stable-diffusion.cpp", "--sdcpp_python=FILE"),
}


def publish(root: Path, out: str | None, show: bool = False) -> None:
    """Write the report to `out`; without, print it if `show`."""
    if out is not None:
        write_bytes(out, text(root).encode())
    elif show:
        print(text(root))


def failed(root: Path) -> list[str]:
    """Return the checks whose client did not take an export as it should."""
    return [
        f"{family} {check.name}"
        for family in FAMILIES
        for check, found in _results(root, family).items()
        if found is not None and not checks.is_good(found)
    ]


def text(root: Path) -> str:
    """Return the report of all families in a folder."""
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "torch", "diffusers", "transformers", "peft")
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    sections = [_family(root, family) for family in FAMILIES]
    return f"""# Clients

Every export, loaded by the programs that it is for. Written by `make clients`, which says how it is
done. Models have the full width of the published ones and random weights. Adapters are random too,
of rank {material.RANK} and alpha {material.ALPHA:g}. Each row is a client's own code in a process
of its own. Memory is the most that the process held, with what it mapped of files.

- **keys**: tensors in the exported file. A row is good where the client takes all of them.
- **deltas**: the most by which a weight in the client, less the pretrained one, differs from
  B A alpha / rank; {CLOSE:g} is allowed. Weights are matched by their values, not by their names.
- **image**: the most that a color differs from that of stock diffusers, of 255, from the same noise
  and tokens; {CLOSE_COLOR} is allowed. ComfyUI's are drawn by its server, from the workflow in the
  export of a run of {material.SIZE} x {material.SIZE} px. It gives SD3 no tokens of a missing T5,
  so diffusers gets none there either. stable-diffusion.cpp draws an empty prompt on the same
  sigmas, as its tokenizer is not the pipeline's; its version is stable-diffusion-cpp-python's.

Made on {os.cpu_count()} CPU cores ({cpu()}), {memory:.1f} GiB; Python {platform.python_version()},
{packages}. Other clients run in environments of their own.

{chr(10).join(sections)}
## Never tried here

- A1111: this command has no check of it.
- ComfyUI's front end: the graph goes to the server's API, by the server's definitions of nodes.
- InvokeAI, which reads adapters in kohya's format alone.
"""


def _results(root: Path, family: str) -> dict[Check, Result | None]:
    at = Places(root / family)
    return {check: checks.result(check, at) for check in checks.all_of(family)}


def _family(root: Path, family: str) -> str:
    results = _results(root, family)
    rows = [_row(check, found) for check, found in results.items()]
    header = ["client", "export", "keys", "deltas", "image", "peak, GiB", "found"]
    parts = [f"## {FAMILIES[family].title}", table(header, rows)]
    found = [x for x in results.values() if x and "largest" in x]
    if found:
        parts.append(
            f"Adapters change {found[0]['modules']} layers, a weight by at most "
            f"{found[0]['largest']:.2g}."
        )
    if any(x and x.get("replaced") for x in results.values()):
        parts.append(
            "This ComfyUI has no ManualSigmas: BasicScheduler stood for it, as the workflow's note "
            "says."
        )
    return "\n\n".join(parts) + "\n"


def _row(check: Check, found: Result | None) -> list[str]:
    client = CLIENTS[check.client]
    if found is None:
        said = f"not run: `make clients FLAGS='{' '.join(_flags(check))}'`"
        return [client.title, _export(check), "", "", "", "", said]
    version = " ".join(filter(None, (found.get("version"), found.get("commit"))))
    return [
        f"{client.title} {version}".strip(),
        _export(check),
        str(found.get("keys", "")),
        f"{found['error']:.0e}" if "error" in found else "",
        f"{found['color_error']:.0f}" if "color_error" in found else "",
        _peak(found),
        _said(found),
    ]


def _flags(check: Check) -> list[str]:
    return [f"--family={check.family}", *filter(None, [CLIENTS[check.client].flags])]


def _export(check: Check) -> str:
    return f"{check.form}, {check.what}"


def _peak(found: Result) -> str:
    peaks = [window["peak_bytes"] for window in found.get("windows", {}).values()]
    return f"{max(peaks) / _GIB:.1f}" if peaks else ""


def _said(found: Result) -> str:
    """Return "good", or what is wrong."""
    if checks.is_good(found):
        return "good"
    if "failure" in found:
        return f"**failed**: {found['failure'].replace('|', '/')}"
    said = []
    if found.get("ignored"):
        said.append(f"{len(found['ignored'])} ignored, the first {found['ignored'][0]}")
    if found.get("absent"):
        said.append(f"{len(found['absent'])} layers unchanged, the first {found['absent'][0]}")
    return f"**wrong**: {'; '.join(said) or 'too far'}".replace("|", "/")
