"""Helpers of the benchmarks: median times, the machine's description, and report sections."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from r0_jax.files import write_bytes


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of `repeats` calls, each waited for, after one warm-up call."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(found)


def machine(*packages: str) -> str:
    """Return device, Python and package versions as one sentence."""
    device = jax.devices()[0]
    name = device.device_kind if device.platform != "cpu" else f"{os.cpu_count()} CPU cores"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return f"{name}; Python {platform.python_version()}, {', '.join(versions)}."


def given_flags() -> str:
    """Return the flags of the command line, without --out."""
    return " ".join(flag for flag in sys.argv[1:] if not flag.startswith("--out"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(out: str | None, heading: str, text: str) -> None:
    """Write a section of the document `out`; print it if `out` is None."""
    if out is None:
        print(f"{heading}\n\n{text}\n")
    else:
        write_section(out, heading, text)


def read_section(path: str | Path, heading: str) -> str:
    """Return what stands under `heading`; nothing where there is no such heading or document."""
    _, inside, _ = _parts(Path(path), heading)
    return "\n".join(inside[1:]).strip("\n")


def write_section(path: str | Path, heading: str, text: str) -> None:
    """Put `text` under `heading` in place of what stood there.

    Where there is no such heading, it comes at the end of the document. The rest stays as it is.
    """
    before, _, behind = _parts(Path(path), heading)
    parts = ["\n".join(before), f"{heading}\n\n{text}", "\n".join(behind)]
    parts = [part.strip("\n") for part in parts]
    write_bytes(path, ("\n\n".join(filter(None, parts)) + "\n").encode())


def _parts(path: Path, heading: str) -> tuple[list[str], list[str], list[str]]:
    """Return the lines before a section, of it with its heading, and behind it.

    A section ends at the next heading of its level or above.
    """
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    level = len(heading) - len(heading.lstrip("#"))
    begin = lines.index(heading) if heading in lines else len(lines)
    above = tuple("#" * n + " " for n in range(1, level + 1))
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith(above)), len(lines))
    return lines[:begin], lines[begin:end], lines[end:]
