"""Runs of an ablation spread over the devices of one machine: a process each, a device each."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from r0_jax.ablation.grid import Cell
from r0_jax.errors import STOPPED, InputError
from r0_jax.parallel.stop_signal import Stopped

_POLL = 0.5  # seconds


def device_only(number: int) -> dict[str, str]:
    """Return environment variables that leave a process one GPU, or one chip of a TPU host."""
    return {
        "CUDA_VISIBLE_DEVICES": str(number),
        "TPU_VISIBLE_CHIPS": str(number),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        # Processes of one host must not wait for each other's libtpu.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def run(cells: Sequence[Cell], jobs: int, arguments: Sequence[str]) -> bool:
    """Run `python -m r0_jax.ablate ARGUMENTS --only=CELL` for each cell, `jobs` at a time.

    Job i sees device i alone. Returns False where a run was stopped by a SIGTERM. A SIGTERM or an
    interrupt of this process is passed on, and the runs save what they trained. Raises InputError
    where a run fails; the others end first.
    """
    waiting, free = list(cells), list(range(jobs))
    running: dict[int, tuple[subprocess.Popen, Cell]] = {}
    stopped, failed = False, []
    try:
        while waiting or running:
            while waiting and free and not (stopped or failed):
                device, cell = free.pop(0), waiting.pop(0)
                command = [sys.executable, "-m", "r0_jax.ablate", *arguments, f"--only={cell.name}"]
                running[device] = (
                    subprocess.Popen(command, env=os.environ | device_only(device)),
                    cell,
                )
            if stopped or failed:
                waiting = []
            time.sleep(_POLL)
            for device, (process, cell) in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[device]
                    free.append(device)
                    stopped |= status == STOPPED
                    failed += [cell.name] * (status not in (0, STOPPED))
    except (Stopped, KeyboardInterrupt):
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
        raise
    if failed:
        raise InputError(f"these runs failed, as their lines above say: {', '.join(failed)}")
    return not stopped
