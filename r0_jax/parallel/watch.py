"""Watches the other processes of a run: it ends as one."""

import json
import os
import threading
import time
from typing import NoReturn, Protocol, runtime_checkable

from r0_jax.errors import STOPPED

_FAILED, _ALIVE = "r0_jax/failed", "r0_jax/alive/"
_CONTINUE = "start the same command again to continue"


@runtime_checkable
class Service(Protocol):
    """A client of the coordination service of jax.distributed: what r0_jax uses of it."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Set a key; raise an error if it is set already and may not be overwritten."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Return the value of a key as soon as it is set."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Return all keys that begin with this one, and their values."""

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        """Return when all processes wait here."""


class Watch:
    """Ends this process, with one line on stderr, when another one fails, is lost, or hangs.

    Collectives wait for ever for a process that does not come. So each process sends signs of life
    to process 0, by the coordination service of jax.distributed. It does so in a thread, which
    lives while programs are compiled and files are read. Process 0 judges. Its verdict is a key of
    the service, for which all others wait.

    A process is lost when its sign has not changed for `lost_timeout` seconds. Process 0 is lost
    when its service has not answered for so long. When process 0 has finished nothing for
    `hang_timeout` seconds, the processes that are behind the others hang.
    """

    def __init__(
        self,
        client: Service,
        process: int,
        processes: int,
        lost_timeout: float,
        hang_timeout: float,
    ):
        self._client, self._process, self._processes = client, process, processes
        self._lost, self._hang = lost_timeout, hang_timeout
        self._every = min(5.0, lost_timeout / 8)
        self._leaving = threading.Lock()  # its holder alone says why
        self._stopped = False
        self._threads: list[threading.Thread] = []
        # Seconds that this process was awake: it misses nothing that it could not see.
        self._clock = 0.0
        self._count, self._done, self._moved = 0, "the start", 0.0
        self._answered = 0.0
        # {process: its last sign of life, and when it changed}.
        self._signs: dict[int, tuple[list, float]] = {
            i: ([0, 0, ""], 0.0) for i in range(processes)
        }

    def start(self) -> None:
        """Start the threads."""
        for task in (self._listen, self._judge):
            thread = threading.Thread(target=task, name=f"r0_jax{task.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Miss nobody from here on, and wait for the threads.

        A thread that is inside JAX's service when Python ends aborts the process.
        """
        self._stopped = True
        for thread in self._threads:
            thread.join(self._every + 2)

    def progress(self, done: str) -> None:
        """Note that something is done here, such as "step 12"; no more of it is a hang."""
        self._count, self._done, self._moved = self._count + 1, done, self._clock

    def fail(self, status: int, message: str) -> None:
        """End the others with this status and message; return when they can know."""
        self._take()
        self._say(status, f"process {self._process} of {self._processes}: {message}")

    def wait_for_verdict(self) -> None:
        """Give the watch time to end this process; return if nobody is lost."""
        time.sleep(self._lost + 4 * self._every + 2)

    def _listen(self) -> None:
        beat = 0
        while not self._stopped:
            beat += 1
            try:
                self._client.key_value_set(
                    f"{_ALIVE}{self._process}",
                    json.dumps([beat, self._count, self._done]),
                    allow_overwrite=True,
                )
                if self._process == 0:
                    self._see()
                failed = self._wait()
            except Exception as error:
                if not self._stopped:
                    self._end(
                        1,
                        f"process 0 of {self._processes} is gone, which keeps the others "
                        f"together ({str(error).splitlines()[0]}); {_CONTINUE}",
                    )
                return
            self._answered = self._clock
            if failed is not None:
                self._end(*json.loads(failed))

    def _wait(self) -> str | None:
        """Return the verdict, if it comes before the next sign of life is due."""
        try:
            return self._client.blocking_key_value_get(_FAILED, int(1000 * min(self._every, 1)))
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def _see(self) -> None:
        for key, value in self._client.key_value_dir_get(_ALIVE):
            process, sign = int(key.rsplit("/", 1)[1]), json.loads(value)
            if sign != self._signs[process][0]:
                self._signs[process] = (sign, self._clock)

    def _judge(self) -> None:
        while not self._stopped:
            before = time.monotonic()
            time.sleep(self._every / 2)
            self._clock += min(time.monotonic() - before, self._every)
            if self._clock - self._answered > self._lost:
                self._end(
                    1,
                    f"process 0 of {self._processes} has not answered for "
                    f"{self._lost:g} s; {_CONTINUE}",
                )
            if self._process == 0 and (verdict := self._verdict()):
                self._take()
                self._say(1, verdict)
                self._quit(1, verdict)

    def _verdict(self) -> str | None:
        lost = [i for i, (_, changed) in self._signs.items() if self._clock - changed > self._lost]
        if lost:
            return (
                f"{self._name(lost)} gave no sign of life for {self._lost:g} s: killed, frozen "
                f"or cut off; {_CONTINUE}"
            )
        if self._clock - self._moved <= self._hang:
            return None
        counts = {i: sign[1] for i, (sign, _) in self._signs.items()}
        behind = [i for i, count in counts.items() if count < max(counts.values())]
        if not behind:
            return (
                f"no process finished anything for {self._hang:g} s, after {self._done}; "
                f"{_CONTINUE}"
            )
        return (
            f"{self._name(behind)} stands still for {self._hang:g} s, after "
            f"{self._signs[behind[0]][0][2]}, and the others wait; {_CONTINUE}"
        )

    def _name(self, processes: list[int]) -> str:
        kind = "process" if len(processes) == 1 else "processes"
        return f"{kind} {', '.join(map(str, processes[:8]))} of {self._processes}"

    def _take(self) -> None:
        if not self._leaving.acquire(blocking=False):
            time.sleep(60)  # the other thread ends the process

    def _say(self, status: int, message: str) -> None:
        try:
            self._client.key_value_set(_FAILED, json.dumps([status, message]))
        except Exception:
            return  # another process was first, or nobody listens any more
        if self._process == 0:  # the service ends with it
            time.sleep(1)

    def _end(self, status: int, message: str) -> NoReturn:
        self._take()
        self._quit(status, message)

    def _quit(self, status: int, message: str) -> NoReturn:
        kind = "" if status == STOPPED else "error: "
        os.write(2, f"{kind}{message}\n".encode())  # takes no lock that a frozen thread may hold
        if self._process == 0:
            time.sleep(1)
        os._exit(status)
