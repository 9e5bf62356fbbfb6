"""What the machine refuses, told in one line: memory, and a backend that does not start."""

import os
import re
import resource
import sys
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parent
_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|[Oo]ut of memory|[Uu]nable to allocate|not enough memory|"
    r"[Cc]annot allocate memory|bad_alloc"
)
_ASKED = (  # a number and its unit
    r"allocat\w* (?:array of )?([\d.]+) ?([KMGTP]i?B|bytes)\b",
    r"tried to allocate ([\d.]+) ?([KMGTP]i?B|bytes)\b",
    r"\(([\d.]+) ?(bytes)\)",
    r"([\d.]+) ?([KMGTP]i?B|bytes)\b",
)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_BACKENDS = (
    "Unable to initialize backend",
    "Unknown backend",
    "No visible ",
    "Backend '",
    "no supported devices found",
)
_TRAINING = (
    "a smaller config.device_batch, config.remat='blocks', config.dtype='bfloat16', or more "
    "devices in config.mesh.fsdp"
)
# Module, up to its folder -> the phase, and what takes less memory then. The innermost counts.
_PHASES = {
    "sample": ("drawing images", "a smaller --batch_size, --height and --width"),
    "score": ("scoring images", "a smaller --batch_size"),
    "encode_prompts": ("encoding prompts", "a smaller --batch_size"),
    "convert_reward": ("reading the checkpoint", "a checkpoint without other tensors"),
    "convert_single_file": ("converting the checkpoint", "a machine with more memory"),
    "pretrain": ("pretraining", "smaller batches"),
    "plan": ("planning", "a machine with more memory"),
    "prompts": ("reading prompts", "several smaller files"),
    "weights": (
        "reading weights",
        "a dtype of bfloat16, encoded prompts (docs/prompts.md), or more devices in "
        "config.mesh.fsdp",
    ),
    "export": ("exporting", "a machine with more memory"),
    "workdir": ("reading or writing a checkpoint", "a machine with more memory"),
    "evaluation": ("evaluating", "a smaller config.draw_batch"),
    "training": ("training", _TRAINING),
    "method": ("training", _TRAINING),
}


def problem(error: BaseException | None) -> str | None:
    """Return a line for an error that the machine is the reason of; None for other errors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError | ValueError | OSError) and _MEMORY.search(text)
        ):
            return _memory_line(error)
        if (isinstance(error, RuntimeError) and text.startswith(_BACKENDS)) or _no_backend(error):
            said = text.splitlines()[0][:300] if text else os.environ.get("JAX_PLATFORMS", "")
            return (
                f"JAX cannot start the device that it is asked for ({said}): "
                "set JAX_PLATFORMS to what this machine has, such as cpu, or install JAX for it"
            )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _no_backend(error: BaseException) -> bool:
    """Return whether JAX found that no backend of those asked for exists, which it only asserts."""
    frames = traceback.extract_tb(error.__traceback__) or [traceback.FrameSummary("", 0, "")]
    return isinstance(error, AssertionError) and frames[-1].filename.endswith("xla_bridge.py")


def _memory_line(error: BaseException) -> str:
    phase, advice = _phase(error)
    asked, free = _asked(str(error)), _free()
    numbers = [f"{_size(asked)} were asked for"] if asked else []
    numbers += [f"{_size(free)} are free"] if free is not None else []
    return f"out of memory while {phase}{_in_brackets(numbers)}: try {advice}"


def _in_brackets(texts: list[str]) -> str:
    return f" ({', '.join(texts)})" if texts else ""


def _phase(error: BaseException) -> tuple[str, str]:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            name = path.relative_to(_PACKAGE).parts[0].removesuffix(".py")
            if name in _PHASES:
                return _PHASES[name]
    return "working", "smaller batches or a machine with more memory"


def _asked(text: str) -> int | None:
    """Return the bytes that an allocator's message names."""
    for pattern in _ASKED:
        if found := re.search(pattern, text):
            return int(float(found[1].rstrip(".")) * _UNITS[found[2][0].lower()])
    return None


def _free() -> int | None:
    """Return the free bytes of the fullest accelerator, or of this machine where there is none."""
    jax = sys.modules.get("jax")
    try:
        devices = jax.local_devices() if jax else []
        stats = [device.memory_stats() for device in devices if device.platform != "cpu"]
        if stats:
            return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
    except Exception:  # a device that has just failed
        return None
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo") as file:
            if found := re.search(r"MemAvailable: +(\d+) kB", file.read()):
                free = int(found[1]) * 1024
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            free = min(free, max(0, limit - used))
    except (OSError, ValueError):  # another system than Linux
        return None
    return free


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count = count / 1024
    raise AssertionError
