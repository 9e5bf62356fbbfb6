"""One process of many: it finds the others in the environment, joins them and leaves with them.

Cloud TPU, GKE, SLURM, Open MPI and Kubernetes name the processes in environment variables, most of
which JAX detects. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name them
anywhere. Without any of these a process is alone, and this module does nothing.
"""

import contextlib
import glob
import importlib.util
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from absl import logging
from ml_collections import ConfigDict

from r0_jax.console import console
from r0_jax.errors import BUG, INTERRUPTED, STOPPED, InputError, explain
from r0_jax.parallel import heartbeat
from r0_jax.parallel.stop_signal import Stopped
from r0_jax.parallel.watch import Watch

T = TypeVar("T")

ADDRESS, PORT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
PROCESSES, PROCESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PORT = "8476"  # where only a host is named
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


class Place(NamedTuple):
    """The place of a process among many; JAX asks the machine for what is None.

    Attributes:
      address: host:port of process 0.
      processes: how many there are.
      process: which one this is.
      devices: which of the machine's GPUs are its own; None is all, or those that
        JAX_LOCAL_DEVICE_IDS names.
    """

    address: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None


# --- the environment -----------------------------------------------------------------------------


def find(env: Mapping[str, str], tpu: bool = False) -> Place | None:
    """Return the place that the environment names; None for a process that is alone.

    `tpu` says whether the machine has TPUs. Raises InputError for variables that do not fit each
    other.
    """
    scheduled = _slurm(env) or _open_mpi(env) or (_tpu(env) if tpu else None)
    given = {name: env[name] for name in (ADDRESS, PROCESSES, PROCESS) if env.get(name)}
    if not given and (scheduled in (None, Place()) or scheduled.address):
        return scheduled
    processes = _number(env, PROCESSES)
    if processes == 1:
        return None
    process = _number(env, PROCESS)
    if process is None and not scheduled:
        process = _number(env, "JOB_COMPLETION_INDEX")  # of an indexed Kubernetes Job
    place = scheduled or Place()
    place = place._replace(
        address=_address(env) or place.address,
        processes=place.processes if processes is None else processes,
        process=place.process if process is None else process,
    )
    if scheduled == Place():  # a TPU, which knows the rest
        return place
    names = {ADDRESS: place.address, PROCESSES: place.processes, PROCESS: place.process}
    if missing := [name for name, value in names.items() if value is None]:
        if not given:
            raise InputError(
                f"this is one of {place.processes} processes of mpirun, which does "
                f"not say where process 0 is: set {ADDRESS}=HOST:PORT for all"
            )
        raise InputError(
            f"{' and '.join(given)} set, but not {' nor '.join(missing)}: set all of "
            f"{ADDRESS}, {PROCESSES} and {PROCESS}, or none to run one process"
        )
    if place.processes < 1:
        raise InputError(f"{PROCESSES}={place.processes} must be at least 1")
    if not 0 <= place.process < place.processes:
        raise InputError(
            f"this is process {place.process} of {place.processes}: {PROCESS} must be "
            f"from 0 to {place.processes - 1}"
        )
    return place


def _address(env: Mapping[str, str]) -> str | None:
    host, port = env.get(ADDRESS), env.get(PORT) or _PORT
    if not host and env.get("JOBSET_NAME") and env.get("REPLICATED_JOB_NAME"):
        # Pod 0 of job 0, as JobSet names it in its network.
        host = f"{env['JOBSET_NAME']}-{env['REPLICATED_JOB_NAME']}-0-0.{env['JOBSET_NAME']}"
    if not host:
        return None
    address = host if re.search(r":\d+$", host) else f"{host}:{port}"
    if not re.fullmatch(r".+:\d{1,5}", address) or int(address.rsplit(":", 1)[1]) > 65535:
        raise InputError(f"{ADDRESS}={host} with port {port} is not host:port")
    return address


def _slurm(env: Mapping[str, str]) -> Place | None:
    """Return the place among the tasks of one `srun`.

    In a batch script or a shell of salloc a process is alone.
    """
    tasks = _number(env, "SLURM_STEP_NUM_TASKS")
    tasks = _number(env, "SLURM_NTASKS") if tasks is None else tasks
    if "SLURM_JOB_ID" not in env or "SLURM_STEP_NODELIST" not in env or (tasks or 1) == 1:
        return None
    from jax._src.clusters.slurm_cluster import SlurmCluster  # which knows how hosts are written

    with _environment(env):
        address = SlurmCluster.get_coordinator_address(None, env.get(PORT))
    return Place(address, tasks, _number(env, "SLURM_PROCID"), _slurm_gpus(env))


def _slurm_gpus(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return one GPU a task; all that it sees for a task alone on its node or with one GPU."""
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = len(visible) if visible != [""] else _number(env, "SLURM_GPUS_ON_NODE")
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", per_node)  # "1(x4)": one on each of four nodes
    if count and (alone or count == 1):
        return tuple(range(count))
    return _one(env, "SLURM_LOCALID")


def _one(env: Mapping[str, str], name: str) -> tuple[int, ...] | None:
    device = _number(env, name)
    return None if device is None or env.get("JAX_LOCAL_DEVICE_IDS") else (device,)


def _open_mpi(env: Mapping[str, str]) -> Place | None:
    processes = _number(env, "OMPI_COMM_WORLD_SIZE")
    if (processes or 1) == 1:
        return None
    from jax._src.clusters.ompi_cluster import OmpiCluster

    address = None
    if "OMPI_MCA_orte_hnp_uri" in env:  # of Open MPI 4; its successor does not say
        with _environment(env):
            address = OmpiCluster.get_coordinator_address(None, env.get(PORT))
    return Place(
        address,
        processes,
        _number(env, "OMPI_COMM_WORLD_RANK"),
        _one(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
    )


def _tpu(env: Mapping[str, str]) -> Place | None:
    """Return the place on a TPU, which JAX reads from GKE's variables or a VM's metadata server."""
    platforms = env.get("JAX_PLATFORMS", "")
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    slices = _number(env, "MEGASCALE_NUM_SLICES") or 1
    if (platforms and "tpu" not in platforms.split(",")) or (
        hosts and "," not in hosts and slices == 1
    ):
        return None
    return Place()


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if not text:
        return None
    if not re.fullmatch(r"-?\d+", text):
        raise InputError(f"{name}={text} is not a number")
    return int(text)


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Put `env` into os.environ, which JAX's detection reads."""
    before = dict(os.environ)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _has_tpu() -> bool:
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


# --- together ------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(config: ConfigDict) -> Iterator[None]:
    """Join the other processes, before anything touches a device; leave with them at the end.

    An error inside is told here and to the others, and ends all of them at once: one that continued
    alone would wait for ever. A process that is lost or hangs ends the others, too (see `Watch`).
    """
    place = find(os.environ, _has_tpu())
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
    if alone or known.num_processes == 1:
        yield
        return
    watch = Watch(
        _client(), known.process_id, known.num_processes, fields.lost_timeout, fields.hang_timeout
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
    if _client() is None:
        return make()
    key = f"r0_jax/first/{next(_calls)}"
    if jax.process_index() == 0:
        _client().key_value_set(key, json.dumps(make()))
    return json.loads(_client().blocking_key_value_get(key, _WEEK))


def of_all(value: Any) -> list[Any]:
    """Return the values of all processes, in their order, as JSON has them.

    All processes call this in the same order.
    """
    if _client() is None:
        return [value]
    folder = f"r0_jax/all/{next(_calls)}/"
    _client().key_value_set(f"{folder}{jax.process_index()}", json.dumps(value))
    together()
    found = {
        int(key.rsplit("/", 1)[1]): json.loads(text)
        for key, text in _client().key_value_dir_get(folder)
    }
    return [found[process] for process in sorted(found)]


def together() -> None:
    """Return when all processes are here."""
    if _client() is not None:
        _client().wait_at_barrier(f"r0_jax/together/{next(_calls)}", _WEEK)


def barrier(*, key: str, timeout_ms: int) -> None:
    """Wait as `together` does, in the form that orbax asks for.

    A process whose save has failed does not wait: nobody would come, and it would say that instead
    of why.
    """
    if sys.exc_info()[1] is None:
        _client().wait_at_barrier(key, timeout_ms)


def _client() -> Any:
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
    if line is None and status != INTERRUPTED:
        traceback.print_exception(error)
        sys.stderr.flush()
    said = line or f"{type(error).__name__}: {error}".splitlines()[0]
    said = "it was interrupted" if status == INTERRUPTED else said
    watch.fail(status, said)
    _exit(status, line)


def _exit(status: int, line: str | None) -> NoReturn:
    # Not sys.exit: at the end JAX waits for processes that wait for this one.
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
