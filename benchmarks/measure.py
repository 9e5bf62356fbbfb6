"""What the benchmarks share: medians, the machine in words, and sections of a document."""

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
    """Median of `repeats` calls, each waited for, after one that is not counted."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(found)


def machine(*packages: str) -> str:
    """The device and versions that a number belongs to, as one sentence."""
    device = jax.devices()[0]
    name = device.device_kind if device.platform != "cpu" else f"{os.cpu_count()} CPU cores"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return f"{name}; Python {platform.python_version()}, {', '.join(versions)}."


def given_flags() -> str:
    """The command's flags as they were given, without --out."""
    return " ".join(flag for flag in sys.argv[1:] if not flag.startswith("--out"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is words, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(out: str | None, heading: str, text: str) -> None:
    """Writes a section of the document `out`; without one, prints it."""
    if out is None:
        print(f"{heading}\n\n{text}\n")
    else:
        write_section(out, heading, text)


def write_section(path: str | Path, heading: str, text: str) -> None:
    """Puts `text` under `heading`, in place of what stood there up to the next heading of its
    level or above, else at the end of the document; the rest stays as it is."""
    path = Path(path)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    level = len(heading) - len(heading.lstrip("#"))
    begin = lines.index(heading) if heading in lines else len(lines)
    above = tuple("#" * n + " " for n in range(1, level + 1))
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith(above)), len(lines))
    parts = ["\n".join(lines[:begin]), f"{heading}\n\n{text}", "\n".join(lines[end:])]
    parts = [part.strip("\n") for part in parts]
    write_bytes(path, ("\n\n".join(filter(None, parts)) + "\n").encode())
