"""Starts a program as several connected CPU processes of this machine:

    python launch/local.py --processes=4 -- -m r0_jax.main --config=configs/shapes_r0.py --workdir=W

The arguments after -- are those of Python. [2] precedes every line of process 2. When a process
fails, the others have --grace seconds to end; then they are stopped. The exit status is that of
the first process that failed, or 0. SIGTERM and Ctrl-C are passed on.
"""

import argparse
import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

_POLL = 0.1  # seconds
_printing = threading.Lock()  # keeps lines of different processes apart


def main() -> int:
    flags = _flags()
    commands = [[sys.executable, *flags.command]] * flags.processes
    port = _free_port()
    environments = [_environment(flags, port, i) for i in range(flags.processes)]
    if flags.dry_run:
        for command, added in zip(commands, environments, strict=True):
            print(
                shlex.join(["env", *(f"{name}={value}" for name, value in added.items()), *command])
            )
        return 0
    # Each process starts its own session, so that only this program passes on Ctrl-C.
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | added,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for command, added in zip(commands, environments, strict=True)
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _send(processes, number))
    unheard = functools.partial(_send, processes, signal.SIGTERM)
    printers = [
        threading.Thread(target=_print, args=(i, stream, out, unheard))
        for i, process in enumerate(processes)
        for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for printer in printers:
        printer.start()
    status = _wait(processes, flags.grace)
    for printer in printers:
        printer.join()
    for out in (sys.stdout, sys.stderr):
        try:
            out.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # Python flushes at exit
    return status


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python launch/local.py --processes=N [flags] -- -m MODULE [its flags]",
    )
    parser.error = _error
    parser.add_argument("--processes", type=_positive, required=True, help="number of processes")
    parser.add_argument(
        "--devices_per_process",
        type=_positive,
        default=1,
        help="CPU devices of JAX in each process",
    )
    parser.add_argument(
        "--grace",
        type=_positive,
        default=120,
        help="seconds until the others are stopped after a process fails",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("command", nargs="*", help="-m MODULE or FILE, and its flags")
    flags = parser.parse_args()
    if not flags.command:
        _error("there is nothing to run: give -- -m MODULE at the end")
    return flags


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _error(message: str) -> None:
    print(f"error: {message} (see --help)", file=sys.stderr)
    sys.exit(2)


def _environment(flags: argparse.Namespace, port: int, process: int) -> dict[str, str]:
    fake_devices = r"--xla_force_host_platform_device_count=\d+"  # would override our number
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(flags.devices_per_process),
        "XLA_FLAGS": re.sub(fake_devices, "", os.environ.get("XLA_FLAGS", "")).strip(),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(flags.processes),
        "JAX_PROCESS_ID": str(process),
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _print(process: int, stream: IO[bytes], out: IO[str], unheard: Callable[[], None]) -> None:
    heard = True
    for line in stream:  # read to the end, otherwise the process would block
        if heard and not line.startswith(b"[Gloo] Rank"):  # noise on standard output
            text = line.decode("utf-8", "replace").rstrip("\n")
            try:
                with _printing:
                    out.write(f"[{process}] {text}\n")
                    out.flush()
            except BrokenPipeError:
                heard = False
                unheard()


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait(processes: list[subprocess.Popen], grace: float) -> int:
    status, deadline, signals = 0, float("inf"), [signal.SIGTERM, signal.SIGKILL]
    while None in [process.poll() for process in processes]:
        for i, process in enumerate(processes):
            if status == 0 and process.returncode:
                status = process.returncode
                deadline = time.monotonic() + grace
                print(f"process {i} of {len(processes)} {_how(status)}", file=sys.stderr)
        if time.monotonic() > deadline and signals:
            print(f"the others did not end within {grace:g} s: stopping them", file=sys.stderr)
            _send(processes, signals.pop(0))
            deadline, grace = time.monotonic() + 10, 10
        time.sleep(_POLL)
    status = status or next((p.returncode for p in processes if p.returncode), 0)
    return status if status >= 0 else 128 - status  # as in shells


def _how(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


if __name__ == "__main__":
    sys.exit(main())
