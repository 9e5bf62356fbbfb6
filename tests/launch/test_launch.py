"""What is in launch/: linted, dry runs, and the scripts among stand-ins for gcloud and srun."""

import copy
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
POD, SLURM, JOBSET = LAUNCH / "tpu_pod.sh", LAUNCH / "slurm.sbatch", LAUNCH / "gke_jobset.yaml"
DOCKERFILES = [LAUNCH / "Dockerfile.tpu", LAUNCH / "Dockerfile.cuda"]
RUN = ["--config=configs/sdxl_r0.py", "--workdir=gs://bucket/a run"]


@pytest.mark.parametrize("script", [POD, SLURM, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert script.stat().st_mode & 0o111 or script == SLURM


def start(script, *arguments, path=None, **env):
    """Runs a script, wherever that is, with `path` before all other programs."""
    env = os.environ | env
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=ROOT / "tests",
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(folder, name, body):
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    file.chmod(0o755)


# --- TPU pod --------------------------------------------------------------------------------------

TPU = {"TPU_NAME": "r0", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-16"}


def pod(*arguments, path=None, **env):
    return start(POD, *arguments, path=path, **TPU | env)


def commands(result):
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line) for line in result.stdout.splitlines()]


def test_a_pods_dry_run_prints_what_would_run_and_runs_nothing(tmp_path):
    program(tmp_path, "gcloud", "exit 1")
    actions = ["create", "wait", "copy", "install", "run", "logs", "stop", "delete"]
    lines = commands(pod("--dry-run", *actions, "--", *RUN, path=tmp_path))
    verbs = [" ".join(line[3:5]) for line in lines if line[0] == "gcloud"]
    assert verbs == [
        "queued-resources create",
        "queued-resources describe",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "queued-resources delete",
    ]
    assert lines[0][5:] == [
        "r0",
        "--zone=us-west4-a",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=r0",
    ]
    for line in lines[1:]:
        assert line[0] == "bash" or "--zone=us-west4-a" in line
    remote = [line for line in lines if "ssh" in line]
    assert [("--worker=all" in line) for line in remote] == [True, True, True, False, True]
    for line in remote:
        [sent] = [word for word in line if word.startswith("--command=")]
        subprocess.run(["bash", "-n", "-c", sent.removeprefix("--command=")], check=True)
    # A path with a space arrives as one argument of the run.
    run = next(word for line in remote for word in line if "nohup" in word)
    assert shlex.split(run.split("r0_jax.main")[1].split(">>")[0]) == RUN
    install = next(word for line in remote for word in line if "pip install" in word)
    for file in re.findall(r"-r (\S+)", install):
        assert (ROOT / file).is_file()


def test_several_slices_are_made_at_once_and_started_one_after_the_other():
    lines = commands(
        pod(
            "--dry-run",
            "create",
            "run",
            "--",
            *RUN,
            TPU_SLICES="2",
            TPU_SPOT="yes",
            TPU_TYPE="v6e-8",
        )
    )
    assert lines[0][-4:] == [
        "--runtime-version=v2-alpha-tpuv6e",
        "--node-prefix=r0",
        "--node-count=2",
        "--spot",
    ]
    assert [line[5] for line in lines[1:]] == ["r0-0", "r0-1"]


@pytest.mark.parametrize(
    "arguments, env, said",
    [
        ([], {}, "TPU_SLICES  number of slices"),
        (["start"], {}, "launch/tpu_pod.sh create wait"),
        (["create"], {"TPU_TYPE": "h100"}, "TPU_TYPE=h100 is not v4-*"),
        (["create"], {"TPU_NAME": ""}, "error: TPU_NAME is not set"),
        (["create"], {"TPU_SLICES": "two"}, "error: TPU_SLICES=two is not a number of at least 1"),
        (["create"], {"TPU_SLICES": "0"}, "error: TPU_SLICES=0 is not a number of at least 1"),
        (["create", "wait", "run"], {}, "run needs -- --config="),
    ],
)
def test_what_is_missing_is_said(arguments, env, said):
    result = pod(*arguments, **env)
    assert result.returncode == 2 and said in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    "says, status", [("echo ACTIVE", 0), ("echo FAILED", 1), ("echo SUSPENDED", 1), ("exit 3", 1)]
)
def test_waiting_ends_when_there_is_nothing_to_wait_for(tmp_path, says, status):
    program(tmp_path, "gcloud", says)
    assert pod("wait", path=tmp_path).returncode == status


def test_what_is_copied_is_what_runs(tmp_path):
    """The archive that the workers get has the package, the recipes and the requirements."""
    program(tmp_path, "gcloud", 'echo "$@"')
    result = pod("copy", path=tmp_path, TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / "r0_jax-r0.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"r0_jax/main.py", "configs/sdxl_r0.py", "requirements.txt"} <= names
    assert not any(name.startswith(".venv") for name in names)


def test_a_worker_runs_one_job_at_a_time(tmp_path):
    """The commands that the workers get, run by a shell in a home of its own."""
    home = tmp_path / "home"
    (home / "r0_jax" / ".venv" / "bin").mkdir(parents=True)
    program(
        tmp_path,
        "gcloud",
        f"""export HOME={home}; cd ~
        for word; do [[ $word != --command=* ]] || bash -c "${{word#--command=}}"; done""",
    )

    def act(*actions):
        return pod(*actions, "--", *RUN, path=tmp_path)

    said = act("run")
    assert said.returncode == 1 and "error: first do copy and install" in said.stderr
    program(home / "r0_jax" / ".venv" / "bin", "python", 'echo "$@"; exec sleep 60')
    assert act("run").returncode == 0
    said = act("run")
    assert said.returncode == 1 and "a run is active here: stop it first" in said.stderr
    assert act("stop").returncode == act("run").returncode == act("stop").returncode == 0
    lines = (home / "r0_jax.log").read_text("utf-8").splitlines()
    assert lines.count(f"-m r0_jax.main {' '.join(RUN)}") == 2


# --- SLURM ----------------------------------------------------------------------------------------

# Long options of sbatch that a job of several nodes may want, as its manual has them.
SBATCH = set(
    """account array begin chdir comment constraint container contiguous core-spec
cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline dependency distribution error
exclude exclusive export extra-node-info get-user-env gpu-bind gpu-freq gpus gpus-per-node
gpus-per-socket gpus-per-task gres gres-flags hint hold input job-name kill-on-invalid-dep licenses
mail-type mail-user mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue
nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket
open-mode output overcommit oversubscribe parsable partition power prefer priority profile
propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches
test-only thread-spec threads-per-core time time-min tmp use-min-nodes verbose wait wait-all-nodes
wckey wrap""".split()
)


def directives():
    """{option: value} of the lines that sbatch reads, which end at the first command."""
    found = {}
    for line in SLURM.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            [option] = shlex.split(line.removeprefix("#SBATCH"))
            name, _, value = option.removeprefix("--").partition("=")
            found[name] = value
    return found


def test_sbatch_knows_the_options():
    found, text = directives(), SLURM.read_text("utf-8")
    assert len(found) == text.count("#SBATCH --") and set(found) <= SBATCH
    assert int(found["nodes"]) > 1 and found["ntasks-per-node"] == "1"  # has all of its GPUs
    assert re.fullmatch(r"B:[A-Z0-9]+@\d+", found["signal"]) and "requeue" in found
    assert re.fullmatch(r"(\d+-)?\d\d:\d\d:\d\d", found["time"])


def test_slurms_dry_run_prints_the_line_of_srun(tmp_path):
    program(tmp_path, "srun", "exit 1")
    for arguments in (["--dry-run", *RUN], [*RUN, "--dry-run"]):
        result = start(SLURM, *arguments, path=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert shlex.split(result.stdout) == [
            "srun",
            "--kill-on-bad-exit=1",
            ".venv/bin/python",
            "-m",
            "r0_jax.main",
            *RUN,
        ]


def test_slurms_script_is_for_sbatch():
    env = {"SLURM_SUBMIT_DIR": ""}
    result = start(SLURM, *RUN, **env)
    assert result.returncode == 2 and "error: submit this file with sbatch" in result.stderr


@pytest.mark.parametrize(
    "sent, ends, status, requeued",
    [
        (None, 0, 0, False),
        (None, 2, 2, False),  # at its end; a bad config
        (None, 1, 1, False),  # at once: it would only be repeated
        (None, 75, 75, True),  # preempted: the tasks were told
        (signal.SIGUSR1, 75, 75, True),  # its time is over
        (signal.SIGUSR1, 137, 137, True),  # and the last of the tasks did not end with the others
        (signal.SIGUSR1, 0, 0, False),  # and the run at its end
        (signal.SIGTERM, 75, 75, False),
    ],
)  # cancelled
def test_a_job_whose_time_is_over_saves_and_is_queued_again(tmp_path, sent, ends, status, requeued):
    """Among stand-ins: of srun, which kills its tasks at a SIGTERM, and of scancel, which signals
    the tasks."""
    ready, queued, told = (tmp_path / name for name in ("ready", "queued", "told"))
    stays = "" if sent is None else f"until [[ -e {told} ]]; do sleep 0.05; done"
    program(
        tmp_path,
        "srun",
        f"trap 'exit 137' TERM\n[[ $SRUN_CPUS_PER_TASK == 32 ]] || exit 3\n"
        f"touch {ready}\n{stays}\nsleep 0.2\nexit {ends}",
    )
    program(tmp_path, "scancel", f'[[ "$*" == "--signal=TERM 7" ]] && touch {told}')
    program(tmp_path, "scontrol", f'echo "$@" > {queued}')
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    job = subprocess.Popen(["bash", SLURM, *RUN], env=env)
    if sent is not None:
        until = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        job.send_signal(sent)
    assert job.wait(timeout=30) == status
    assert (queued.read_text() if queued.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize("after, requeued", [(601, True), (599, False)])
def test_a_node_that_is_lost_late_costs_a_restart(tmp_path, after, requeued):
    queued = tmp_path / "queued"
    program(tmp_path, "srun", "exit 137")
    program(tmp_path, "scontrol", f'echo "$@" > {queued}')
    late = tmp_path / "late.sbatch"
    text = SLURM.read_text("utf-8").replace("status=0\n", f"SECONDS={after} status=0\n", 1)
    late.write_text(text, encoding="utf-8")
    assert (
        start(late, *RUN, path=tmp_path, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT)).returncode
        == 137
    )
    assert queued.exists() == requeued


# --- Kubernetes -----------------------------------------------------------------------------------

SCHEMA = json.loads((ROOT / "tests" / "data" / "jobset.schema.json").read_text("utf-8"))


def jobset(text=None):
    return yaml.safe_load(JOBSET.read_text("utf-8") if text is None else text)


def job_of(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(found):
    return job_of(found)["template"]["spec"]


def test_the_jobset_follows_its_schema():
    found = jobset()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA)
    typing_errors = [
        lambda x: x["spec"]["failurePolicy"].update(maxRestart=1),
        lambda x: x["spec"]["failurePolicy"]["rules"][0].update(action="FailJob"),
        lambda x: job_of(x)["podFailurePolicy"]["rules"][0].pop("onExitCodes"),
        lambda x: x["spec"]["replicatedJobs"][0].update(name="Slice_0"),
        lambda x: pod_of(x).pop("restartPolicy"),
        lambda x: pod_of(x)["nodeSelector"].update({"cloud.google.com/gke-spot": True}),
        lambda x: pod_of(x)["containers"][0].update(image="image"),
    ]
    for mistake in typing_errors:
        wrong = copy.deepcopy(found)
        mistake(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


def test_the_jobsets_topology_is_that_of_its_hosts():
    found = jobset()
    job, spec = job_of(found), pod_of(found)
    rows, columns = spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    [container] = spec["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) / chips
    assert spec["terminationGracePeriodSeconds"] > 30  # Kubernetes' default is short


def test_the_jobsets_flags_are_fields_of_its_recipe():
    args = dict(
        arg.removeprefix("--").split("=", 1) for arg in pod_of(jobset())["containers"][0]["args"]
    )
    recipe = Path(args.pop("config"))
    config = importlib.import_module(".".join(recipe.with_suffix("").parts)).get_config()
    assert args.pop("workdir").startswith("gs://")
    for name in args:
        section = config
        for part in name.removeprefix("config.").split("."):
            section = section[part]


def test_the_jobset_for_gpus_names_its_first_pod():
    """As its comments say."""
    text = re.sub(
        r"^(\s*)# (env:|  - \{|cloud\.google\.com/gke-accelerator)",
        r"\1\2",
        JOBSET.read_text("utf-8"),
        flags=re.MULTILINE,
    )
    text = text.replace("google.com/tpu: 4", "nvidia.com/gpu: 8")
    found = jobset(text)
    jsonschema.validate(found, SCHEMA)
    [jobs], name = found["spec"]["replicatedJobs"], found["metadata"]["name"]
    env = {entry["name"]: entry["value"] for entry in pod_of(found)["containers"][0]["env"]}
    assert env == {
        "JAX_COORDINATOR_ADDRESS": f"{name}-{jobs['name']}-0-0.{name}:8476",
        "JAX_NUM_PROCESSES": str(jobs["template"]["spec"]["completions"]),
    }
    assert "cloud.google.com/gke-accelerator" in pod_of(found)["nodeSelector"]


# --- Containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.suffix)
def test_a_container_is_built_of_what_is_there(file):
    text = file.read_text("utf-8").replace("\\\n", "")
    lines = [
        line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")
    ]
    assert {word for word, _ in lines} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    [base] = [rest for word, rest in lines if word == "FROM"]
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base)
    copied = [source for word, rest in lines if word == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    installed = re.findall(r"-r (\S+)", " ".join(rest for word, rest in lines if word == "RUN"))
    assert set(installed) <= set(copied) and len(installed) == 2
    for name in installed:  # and what these ask for
        asked = re.findall(r"^-r (\S+)", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        assert set(asked) <= set(copied)
    [entry] = [json.loads(rest) for word, rest in lines if word == "ENTRYPOINT"]
    assert entry == ["tini", "--", "python", "-m", "r0_jax.main"]
    assert {"r0_jax", "configs"} <= set(copied)
