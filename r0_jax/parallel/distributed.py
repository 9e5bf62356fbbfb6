"""Joins the other processes and leaves with them.

A process that is alone (see `place.find`) joins none, and this module does nothing.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
from absl import logging
from ml_collections import ConfigDict

from r0_jax.console import console
from r0_jax.errors import BUG, INTERRUPTED, STOPPED, TERMINATED, InputError, explain, printable
from r0_jax.parallel import heartbeat
from r0_jax.parallel.place import ADDRESS, Place, find, has_tpu
from r0_jax.parallel.stop_signal import Stopped
from r0_jax.parallel.watch import Service, Watch

T = TypeVar("T")

_WEEK = 7 * 24 * 3600 * 1000  # milliseconds; the watch ends a process long before
# What a collective says when its other end is gone; any other error is this process's own.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|socket closed|unavailable|coordination"
    r"|deadline.exceeded|barrier|heartbeat",
    re.IGNORECASE,
)

_calls = itertools.count()


class ApartError(Exception):
    """The other processes did not come.

    It is not this process's mistake and a restart may help, so its status is 1, not 2.
    """


@contextlib.contextmanager
def joined(config: ConfigDict) -> Iterator[None]:
    """Join the other processes, before anything touches a device; leave with them at the end.

    An error inside is told here and to the others, and ends all of them at once: one that continued
    alone would wait for ever. A process that is lost or hangs ends the others, too (see `Watch`).
    """
    place = find(os.environ, has_tpu())
    if place is None:
        yield
        return
    fields = config.processes
    try:
        alone = not _initialize(place, fields.start_timeout, fields.lost_timeout)
    except InputError as error:
        _exit(*explain(error))
    except ApartError as error:
        _exit(BUG, str(error))
    known = jax._src.distributed.global_state  # without asking a device, which may not start
    client = _client()
    if alone or client is None or known.num_processes == 1:
        yield
        return
    watch = Watch(
        client, known.process_id, known.num_processes, fields.lost_timeout, fields.hang_timeout
    )
    watch.start()
    try:
        if jax.process_index() != 0:  # it would say the same as process 0
            warnings.simplefilter("ignore")
            logging.set_verbosity(logging.ERROR)
            console.quiet = True
        with heartbeat.heard_by(watch.progress):
            yield
        together()
    except Stopped:
        watch.fail(
            STOPPED,
            "was asked to stop, and all stop; what was trained is saved: the "
            "same command continues",
        )
        _exit(STOPPED, None)
    except BaseException as error:
        _leave(error, watch)
    watch.stop()
    jax.distributed.shutdown()


def of_first(make: Callable[[], T]) -> T:
    """Return what `make` returns in process 0, which alone calls it, as JSON has it.

    The others wait. All processes call this in the same order.
    """
    if (client := _client()) is None:
        return make()
    key = f"r0_jax/first/{next(_calls)}"
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(make()))
    return json.loads(client.blocking_key_value_get(key, _WEEK))


def of_all(value: T) -> list[T]:
    """Return the values of all processes, in their order, as JSON has them.

    All processes call this in the same order.
    """
    if (client := _client()) is None:
        return [value]
    folder = f"r0_jax/all/{next(_calls)}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(value))
    together()
    found = {
        int(key.rsplit("/", 1)[1]): json.loads(text)
        for key, text in client.key_value_dir_get(folder)
    }
    return [found[process] for process in sorted(found)]


def together() -> None:
    """Return when all processes are here."""
    if (client := _client()) is not None:
        client.wait_at_barrier(f"r0_jax/together/{next(_calls)}", _WEEK)


def barrier(*, key: str, timeout_ms: int) -> None:
    """Wait as `together` does, in the form that orbax asks for.

    A process whose save has failed does not wait: nobody would come, and it would say that instead
    of why.
    """
    if sys.exc_info()[1] is None and (client := _client()) is not None:
        client.wait_at_barrier(key, timeout_ms)


def _client() -> Service | None:
    return jax._src.distributed.global_state.client  # orbax reads it too: there is no public way


def _initialize(place: Place, start_timeout: int, lost_timeout: int) -> bool:
    """Join the other processes; return False where JAX finds that this one is alone."""
    if place.address is not None and place.process:
        _await(place.address, start_timeout)
    # JAX's own notice of SIGTERM would take it from `StopSignal`.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(
        start_timeout,
        lambda: _exit(
            BUG,
            (
                f"not all {place.processes or ''} processes came together within "
                f"{start_timeout} s: see "
                "what the others say, then start all of them again"
            ),
        ),
    )
    late.daemon = True
    late.start()  # before JAX's own timeout, which ends the process with a stack trace
    try:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            place.devices,
            cluster_detection_method="deactivate" if None not in place[:3] else None,
            initialization_timeout=start_timeout + 30,
            # JAX ends a process whose neighbour is lost, if the watch could not.
            heartbeat_timeout_seconds=2 * lost_timeout + 10,
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        if place == Place() and "coordinator_address" in str(error):  # a TPU of one machine
            return False
        raise InputError(f"the processes cannot be found: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ApartError(
            f"the processes cannot come together: {reason}; see what the others say, "
            "then start all of them again"
        ) from None
    finally:
        late.cancel()
    return True


def _await(address: str, seconds: int) -> None:
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ApartError(
                    f"process 0 does not answer at {address} within {seconds} s "
                    f"({error}): start it, or correct {ADDRESS}"
                ) from None
        time.sleep(0.5)


def _leave(error: BaseException, watch: Watch) -> NoReturn:
    if not isinstance(error, InputError) and _LOST.search(str(error)):
        watch.wait_for_verdict()  # which names the lost process, and ends this one
    status, line = explain(error)
    if line is None and status == BUG:
        traceback.print_exception(error)
        sys.stderr.flush()
    said = line or f"{type(error).__name__}: {error}".splitlines()[0]
    said = "it was interrupted" if status in (INTERRUPTED, TERMINATED) else said
    watch.fail(status, said)
    _exit(status, line)


def _exit(status: int, line: str | None) -> NoReturn:
    # Not sys.exit: at the end JAX waits for processes that wait for this one.
    if line is not None:
        print(f"error: {printable(line)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
