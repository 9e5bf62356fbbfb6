"""Which environments make a process one of many, without starting any."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.parallel import distributed, heartbeat
from r0_jax.parallel.place import ADDRESS, PROCESS, PROCESSES, Place, find

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-006]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
FOUR_A_NODE = {
    **SLURM,
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NODELIST": "gpu1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
}
PORT = 65535 - 2**12 + 1 + 1  # JAX's choice for job 4097
GIVEN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
JOBSET = {
    "JOBSET_NAME": "r0",
    "REPLICATED_JOB_NAME": "workers",
    "JAX_NUM_PROCESSES": "8",
    "JOB_COMPLETION_INDEX": "5",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPI_5 = {name: value for name, value in MPI.items() if name != "OMPI_MCA_orte_hnp_uri"}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.r0,a-1.r0", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        (GIVEN, Place("10.0.0.1:1234", 4, 3)),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "host0"}, Place("host0:8476", 4, 3)),
        (
            GIVEN | {"JAX_COORDINATOR_ADDRESS": "host0", "JAX_COORDINATOR_PORT": "99"},
            Place("host0:99", 4, 3),
        ),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "[fd00::1]:1234"}, Place("[fd00::1]:1234", 4, 3)),
        (SLURM, Place(f"node003:{PORT}", 4, 2, (0,))),  # without GPUs it means nothing
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, Place(f"node003:{PORT}", 4, 2, tuple(range(8)))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "4,5"}, Place(f"node003:{PORT}", 4, 2, (0, 1))),
        (FOUR_A_NODE | {"SLURM_GPUS_ON_NODE": "4"}, Place(f"gpu1:{PORT}", 4, 2, (2,))),
        (FOUR_A_NODE | {"JAX_LOCAL_DEVICE_IDS": "3"}, Place(f"gpu1:{PORT}", 4, 2)),
        (FOUR_A_NODE | {"CUDA_VISIBLE_DEVICES": "3"}, Place(f"gpu1:{PORT}", 4, 2, (0,))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "login:1"}, Place("login:1", 4, 2, (0,))),
        (MPI, Place("10.96.0.1:62624", 2, 1, (1,))),
        (MPI_5 | {"JAX_COORDINATOR_ADDRESS": "host0"}, Place("host0:8476", 2, 1, (1,))),
        (JOBSET, Place("r0-workers-0-0.r0:8476", 8, 5)),
    ],
)
def test_one_of_many(env, place):
    assert find(env) == place


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"JAX_COORDINATOR_PORT": "8476"},
        GIVEN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell in an allocation for four tasks
        SLURM | {"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},  # a Job of one pod
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        GKE,  # the variables, but no TPU
    ],
)
def test_alone(env):
    assert find(env) is None


def test_tpus_are_asked_by_jax_itself():
    assert find({}, tpu=True) == find(GKE, tpu=True) == Place()
    assert find({"TPU_WORKER_HOSTNAMES": "localhost"}, tpu=True) is None
    assert (
        find({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, tpu=True)
        == Place()
    )
    assert find(GKE | {"JAX_PLATFORMS": "cpu"}, tpu=True) is None


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "not JAX_NUM_PROCESSES nor JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "1"}, "not JAX_COORDINATOR_ADDRESS nor JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"},
            "set, but not JAX_PROCESS_ID",
        ),
        (GIVEN | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID must be from 0 to 3"),
        (GIVEN | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be from 0 to 3"),
        (GIVEN | {"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID=two is not a number"),
        (GIVEN | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0 must be at least 1"),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "a:99999"}, "is not host:port"),
        (GIVEN | {"JAX_COORDINATOR_ADDRESS": "a", "JAX_COORDINATOR_PORT": "x"}, "is not host:port"),
        (MPI_5, "one of 2 processes of mpirun, which does not say where process 0 is"),
    ],
)
def test_variables_that_do_not_fit_together(env, said):
    with pytest.raises(InputError, match=said):
        find(env)


def test_alone_nothing_happens(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("initialized"))
    for name in (ADDRESS, PROCESSES, PROCESS):
        monkeypatch.delenv(name, raising=False)
    with distributed.joined(base.get_config()):
        heartbeat.beat("step 1")
        distributed.together()
        assert distributed.of_first(lambda: (1, "a")) == (1, "a")


def test_a_coordinator_that_does_not_answer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = f"does not answer at 127.0.0.1:{port} within 1 s"
    with pytest.raises(distributed.ApartError, match=said):
        distributed._await(f"127.0.0.1:{port}", 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes=0", "--", "x.py"], "'0' is not a whole number of at least 1"),
        (["--", "x.py"], "--processes"),
        (["--processes=2"], "nothing to run"),
        (["--processes=2", "--prosesses=3", "--", "x.py"], "--prosesses"),
    ],
)
def test_wrong_flags_of_the_launcher_are_one_line(flags, said):
    result = launch(*flags)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and said in line


def test_what_the_launcher_would_run():
    result = launch(
        "--processes=2",
        "--devices_per_process=4",
        "--dry-run",
        "--",
        "-m",
        "r0_jax.main",
        "--config=a b.py",
    )
    assert result.returncode == 0
    for process, line in enumerate(result.stdout.splitlines()):
        assert f"JAX_PROCESS_ID={process} " in line and "JAX_NUM_PROCESSES=2 " in line
        assert "JAX_NUM_CPU_DEVICES=4" in line and "-m r0_jax.main '--config=a b.py'" in line


def test_the_launcher_ends_when_nobody_reads_what_it_prints():
    command = [
        sys.executable,
        "launch/local.py",
        "--processes=2",
        "--",
        "-c",
        "while True: print(0)",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() in ("[0] 0\n", "[1] 0\n")
        run.stdout.close()
        assert run.wait(timeout=60) == 128 + signal.SIGTERM
        assert "Traceback" not in run.stderr.read()


def launch(*flags):
    return subprocess.run(
        [sys.executable, "launch/local.py", *flags],
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
