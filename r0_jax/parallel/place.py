"""Finds the place of a process among many in the environment.

Cloud TPU, GKE, SLURM, Open MPI and Kubernetes name the processes in environment variables, most of
which JAX detects. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name them
anywhere. Without any of these a process is alone.
"""

import contextlib
import glob
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from r0_jax.errors import InputError

ADDRESS, PORT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
PROCESSES, PROCESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PORT = "8476"  # where only a host is named


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
    if place.address is None or place.processes is None or place.process is None:
        if not given:
            raise InputError(
                f"this is one of {place.processes} processes of mpirun, which does "
                f"not say where process 0 is: set {ADDRESS}=HOST:PORT for all"
            )
        names = {ADDRESS: place.address, PROCESSES: place.processes, PROCESS: place.process}
        missing = [name for name, value in names.items() if value is None]
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


def has_tpu() -> bool:
    """Return whether the machine has TPUs that JAX can use."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
