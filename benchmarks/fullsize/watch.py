"""Commands in processes of their own, whose seconds and memory are measured. Linux only."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from r0_jax.errors import InputError

ROOT = Path(__file__).parents[2]
_PAUSE = 0.2  # seconds between looks
_SHOWN = 2000  # characters of a failed command's output


class Window(NamedTuple):
    """A part of a command: `ended` says, from outside, whether it is over."""

    name: str
    ended: Callable[[], bool]


def never() -> bool:
    """Return that a window lasts until its command ends."""
    return False


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def watch(
    command: Sequence[str], log: Path, windows: Sequence[Window], kill: bool = False
) -> dict[str, dict[str, float]]:
    """Run a command; return {window: {seconds, peak_bytes}}.

    Its output goes to the end of `log`. With `kill` it gets SIGKILL when the last window is over.
    Raise InputError with the end of the output if it fails, or ends before it is killed.
    """
    found, running = {}, True
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
    with open(log, "ab") as out:
        out.write(f"\n$ {shlex.join(command)}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            for window in windows:
                begin, most = time.perf_counter(), 0
                clear_peak(process.pid)
                while (running := process.poll() is None) and not window.ended():
                    time.sleep(_PAUSE)
                    most = max(most, peak(process.pid))
                found[window.name] = {
                    "seconds": time.perf_counter() - begin,
                    "peak_bytes": float(most),
                }
                if not running:
                    break
        finally:
            if kill or sys.exc_info()[0] is not None:
                process.kill()
            status = process.wait()
    whole = running and status == -signal.SIGKILL if kill else status == 0
    if not whole:
        end = log.read_bytes()[start:].decode("utf-8", "replace")[-_SHOWN:]
        raise InputError(f"{' '.join(command[1:4])} ended with status {status} ({log}): {end}")
    return found


def clear_peak(process: int) -> None:
    """Let `peak` count from now on."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak(process: int) -> int:
    """Return the most bytes that a process has held since `clear_peak`; 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return 1024 * int(match[1]) if match else 0
