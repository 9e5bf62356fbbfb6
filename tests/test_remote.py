"""Weights and workdirs in gs:// and s3://, which a folder plays (tests/support/object_store.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dry_runs
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils.epath import backend
from gcs_server import gcs  # noqa: F401
from ml_collections import ConfigDict
from object_store import ROOT as STORE_ROOT
from object_store import store  # noqa: F401

from r0_jax import remote
from r0_jax.errors import InputError, explain
from r0_jax.export import model_card
from r0_jax.method import train_state
from r0_jax.pipelines import families
from r0_jax.stand_ins import miniature, miniature_reward
from r0_jax.workdir import checkpoint, checkpoint_manager, mirror
from r0_jax.workdir.run import Run

STORE = str(Path(__file__).parent / "support" / "object_store.py")
URLS = ["gs://bucket/runs/w", "s3://bucket/runs/w"]


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def write(folder: Path, **contents: str) -> None:
    for name, text in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("gs://b/x", "gs://b/x"),
        ("s3://b/x/", "s3://b/x"),
        (Path("gs://b/x"), "gs://b/x"),
        (Path("s3://b"), "s3://b"),
        ("runs/x", None),
        ("/runs/gs:/x", None),
        (Path("a:/b"), None),
    ],
)
def test_urls_survive_pathlib(path, url):
    assert remote.url_of(path) == url


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "http://host/x",
            "http://host/x: http:// is not supported; use gs://, s3:// or a path on this machine",
        ),
        ("hdfs://host/x", "hdfs:// is not supported"),
        ("gs://", "does not name a bucket"),
    ],
)
def test_other_schemes_are_one_line(path, said):
    with pytest.raises(InputError, match=said):
        remote.local(path)


def test_a_folder_is_fetched_once_and_anew_where_it_changed(store, monkeypatch):  # noqa: F811
    there = store / "bucket" / "sd"
    write(there, a="one", b__c="two")
    here = remote.local("s3://bucket/sd")
    assert files(here) == {"a": "one", "b/c": "two"} and here.name == "sd"
    assert remote.local(Path("s3://bucket/sd/")) == here

    fetched = []
    get_file = remote.store("s3://bucket").get_file
    monkeypatch.setattr(
        type(remote.store("s3://bucket")),
        "get_file",
        lambda self, source, target: fetched.append(source) or get_file(source, target),
    )
    write(there, b__c="TWO", d="three")
    (there / "a").unlink()
    remote._fetched.cache_clear()  # another process
    assert files(remote.local("s3://bucket/sd")) == {"b/c": "TWO", "d": "three"}
    assert sorted(fetched) == ["s3://bucket/sd/b/c", "s3://bucket/sd/d"]


def test_a_killed_fetch_leaves_nothing_that_counts(store, monkeypatch):  # noqa: F811
    write(store / "bucket", w="whole")

    def dies(self, source, target):
        Path(target).write_text("who")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(remote.store("gs://bucket")), "get_file", dies)
        remote.local("gs://bucket/w")
    assert not (remote.cache() / "fetched/gs/bucket/w").exists()
    assert remote.local("gs://bucket/w").read_text() == "whole"


def test_what_is_never_read_is_not_fetched(store):  # noqa: F811
    write(
        store / "bucket/sd",
        **{
            "model_index.json": "",
            "sd.safetensors": "",
            "x.ckpt": "",
            "unet__a.safetensors": "",
            "unet__a.bin": "",
            "unet__a.onnx": "",
            "vae__a.bin": "",
        },
    )
    assert set(files(remote.local("gs://bucket/sd"))) == {
        "model_index.json",
        "unet/a.safetensors",
        "vae/a.bin",
    }


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gs://bucket/nothing", "no such object or folder"),
        ("s3://other/x", "no such bucket"),
    ],
)
def test_what_is_not_there_is_one_line(store, path, said):  # noqa: F811
    with pytest.raises(InputError, match=said):
        remote.local(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("Please install gcsfs"), "pip install gcsfs"),
        (ImportError("No module named 'google.cloud'"), "pip install google-cloud-storage"),
        (PermissionError("Forbidden"), "access is denied"),
        (RuntimeError("Your default credentials were not found"), "gcloud auth"),
        (OSError("Anonymous caller does not have storage.objects.list access, 401"), "gcloud auth"),
        (ConnectionRefusedError("refused"), "gs://b/x cannot be reached"),
    ],
)
def test_what_stores_raise_is_one_line(error, said):
    with pytest.raises(InputError, match=said) as raised, remote.told("gs://b/x"):
        raise error
    # A restart may reach it: no mistake of the user's.
    assert explain(raised.value)[0] == (1 if "cannot be reached" in said else 2)


def test_another_process_that_is_lost_is_not_the_store():
    with pytest.raises(jax.errors.JaxRuntimeError), remote.told("gs://b/x"):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: CoordinationService")


def test_a_package_that_is_not_installed(monkeypatch):
    backend.fsspec_backend._get_filesystem.cache_clear()

    def missing(name, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(
        InputError,
        match=r"^s3://b/x: s3:// needs a package that is not installed: "
        r"pip install s3fs$",
    ):
        remote.local("s3://b/x")
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_pipeline_and_outputs(store, tmp_path):  # noqa: F811
    miniature.write(store / "bucket/sd", "StableDiffusionPipeline")
    families.check_there("gs://bucket/sd", "")
    assert not (tmp_path / "cache").exists()  # only looked at
    assert families.load("gs://bucket/sd", images=False).networks
    with pytest.raises(InputError, match=r"gs://bucket/none holds no model_index.json"):
        families.check_there("gs://bucket/none", "")
    with pytest.raises(InputError, match="gs://bucket/out: writing to an object store is not"):
        remote.output("gs://bucket/out")


# --- workdirs ------------------------------------------------------------------------------------


def test_a_local_workdir_stays_what_it_is(tmp_path):
    with mirror.workdir(tmp_path / "w", training=True) as workdir:
        assert workdir.path == tmp_path / "w" and not workdir.path.exists()
        assert workdir.checkpoints == tmp_path.resolve() / "w" / "checkpoints"
        assert not workdir.is_mirror
        workdir.push()
        workdir.push_checkpoint(1)
        workdir.pull_checkpoint(1)
        assert not workdir.path.exists()


@pytest.mark.parametrize("url", URLS)
def test_a_mirror_is_pushed_and_pulled(store, tmp_path, monkeypatch, url):  # noqa: F811
    there = store / "bucket/runs/w"
    with mirror.workdir(url, training=True) as workdir:
        assert workdir.path.name == "w" and not any(workdir.path.iterdir()) and workdir.is_mirror
        write(
            workdir.path,
            **{"metrics.jsonl": "1\n", "prompts__a": "x", "prompts.tmp__a": "x", ".lock": ""},
        )
        workdir.push()
        assert files(there) == {"metrics.jsonl": "1\n", "prompts/a": "x"}
        with (workdir.path / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        (workdir.path / "prompts" / "a").unlink()
    assert files(there) == {"metrics.jsonl": "1\n2\n"}
    assert not (store / "bucket/runs/w/.r0_jax").exists()

    # On another machine.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with mirror.workdir(url, training=True) as workdir:
        assert files(workdir.path) == {"metrics.jsonl": "1\n2\n"}
        write(workdir.path, **{"metrics.jsonl": "1\n2\n3\n"})

    # The first one again: it goes on from the store, not from what it had.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with mirror.workdir(url, training=True) as workdir:
        write(workdir.path, left="over")
        assert files(workdir.path) == {"metrics.jsonl": "1\n2\n3\n", "left": "over"}


def test_who_only_reads_changes_only_what_it_writes(store):  # noqa: F811
    there = store / "bucket/runs/w"
    write(
        there,
        **{
            "metrics.jsonl": "1\n",
            "eval.json": "old",
            "checkpoints__3__metrics__metrics": "{}",
            "checkpoints__3__state__a": "x",
            "checkpoints__4__state__a": "half",
        },
    )
    with mirror.workdir("s3://bucket/runs/w") as workdir:
        assert checkpoint.steps(workdir) == [3]
        assert not (workdir.path / "checkpoints/3/state").exists()
        workdir.pull_checkpoint(3)
        assert (workdir.path / "checkpoints/3/state/a").read_text() == "x"
        write(there, **{"metrics.jsonl": "1\n2\n"})  # by the run, which goes on
        write(workdir.path, **{"eval.json": "new"})
    assert files(there)["metrics.jsonl"] == "1\n2\n" and files(there)["eval.json"] == "new"
    assert files(there)["checkpoints/4/state/a"] == "half"


def test_one_run_a_workdir(store):  # noqa: F811
    with (
        mirror.workdir("s3://bucket/w", training=True),
        pytest.raises(
            InputError, match="another process of this machine is training in s3://bucket/w"
        ),
    ):
        with mirror.workdir("s3://bucket/w", training=True):
            pass
    with pytest.raises(InputError, match="no such bucket"):
        with mirror.workdir("s3://none/w", training=True):
            pass


def test_checkpoints_of_s3_are_there_whole_or_not_at_all(store, monkeypatch):  # noqa: F811
    there, order = store / "bucket/w", []
    kind = type(remote.store("s3://bucket"))
    put, rm = kind.put_file, kind.rm_file
    name = lambda url: url.removeprefix("s3://bucket/w/")  # noqa: E731
    monkeypatch.setattr(
        kind,
        "put_file",
        lambda self, path, url: (order.append(f"+{name(url)}"), put(self, path, url)),
    )
    monkeypatch.setattr(
        kind, "rm_file", lambda self, url: (order.append(f"-{name(url)}"), rm(self, url))
    )
    write(there, checkpoints__1__state__left="of a kill")
    with mirror.workdir("s3://bucket/w", training=True) as workdir:
        assert checkpoint.steps(workdir) == []
        write(
            workdir.path,
            **{
                "checkpoints__1__metrics__metrics": "{}",
                "checkpoints__1__state__a": "x",
                "checkpoints__2.orbax-checkpoint-tmp__state__a": "x",
                "zz": "1",
            },
        )
        order.clear()
        workdir.push()
        assert order == [
            "+zz",
            "+checkpoints/1/state/a",
            "+checkpoints/1/metrics/metrics",
            "-checkpoints/1/state/left",
        ]
        # One that is just being deleted: its files go one by one.
        write(
            workdir.path,
            **{"checkpoints__2__metrics__metrics": "{}", "checkpoints__2__state__a": "x"},
        )
        (workdir.path / "checkpoints/1/state/a").unlink()
        order.clear()
        workdir.push()
        assert order == [
            "+checkpoints/2/state/a",
            "+checkpoints/2/metrics/metrics",
            "-checkpoints/1/metrics/metrics",
            "-checkpoints/1/state/a",
        ]
        assert {name.split("/")[1] for name in files(there) if "checkpoints" in name} == {"2"}


def test_a_file_that_is_being_written_is_no_file_of_a_checkpoint(store):  # noqa: F811
    """Seen once and gone, it would take its checkpoint for one that is being deleted."""
    with mirror.workdir("s3://bucket/w", training=True) as workdir:
        write(
            workdir.path,
            **{
                "checkpoints__1__metrics__metrics": "{}",
                "checkpoints__1__state__a": "x",
                "checkpoints__1__metrics__.metrics.7.tmp": "{",
            },
        )
        workdir.push()
        (workdir.path / "checkpoints/1/metrics/.metrics.7.tmp").unlink()
        workdir.push()
    assert set(files(store / "bucket/w")) == {
        "checkpoints/1/metrics/metrics",
        "checkpoints/1/state/a",
    }


def small_state(step: int):
    params = {"a.kernel": jnp.arange(6.0).reshape(2, 3) + step, "b.bias": jnp.ones(3)}
    state = train_state.init(params, optax.sgd(1e-2))
    return state._replace(step=jnp.asarray(step, jnp.int32))


@pytest.mark.parametrize("url", URLS)
def test_checkpoints_are_saved_restored_and_read(store, gcs, tmp_path, monkeypatch, url):  # noqa: F811
    """gs:// by orbax and tensorstore themselves, s3:// by way of the mirror."""
    there = store / "bucket/runs/w"
    write_metrics = checkpoint_manager.Checkpoints._write_metrics

    def after_its_row(checkpoints, step, metrics, score):
        # A checkpoint that counts as measured is not measured again: the row must be there.
        assert (there / "metrics.jsonl").read_text() == f"{step} measured\n"
        write_metrics(checkpoints, step, metrics, score)

    monkeypatch.setattr(checkpoint_manager.Checkpoints, "_write_metrics", after_its_row)
    with mirror.workdir(url, training=True) as workdir:
        with checkpoint_manager.Checkpoints(workdir, keep=1) as checkpoints:
            for step in (1, 2, 3):
                write(workdir.path, **{"metrics.jsonl": f"{step}\n"})
                checkpoints.save(small_state(step))
                # What is measured up to a checkpoint is there before it.
                assert (there / "metrics.jsonl").read_text() == f"{step}\n"
                write(workdir.path, **{"metrics.jsonl": f"{step} measured\n"})
                checkpoints.add_metrics(step, {"heldout/x": -step}, -float(step))
                checkpoints.wait()
            wait_for(lambda: (there / "checkpoints/3/metrics/metrics").exists())
        assert (workdir.path / "checkpoints").exists() == url.startswith("s3")
        assert checkpoint.steps(workdir) == [1, 3]
    assert sorted(
        path.name
        for path in (there / "checkpoints").iterdir()
        if any(p.is_file() for p in path.rglob("*"))
    ) == ["1", "3"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with mirror.workdir(url, training=True) as workdir:
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(lambda: small_state(0)),
        )
        with checkpoint_manager.Checkpoints(workdir, keep=1) as checkpoints:
            state, _ = checkpoints.restore(target)
        jax.tree.map(np.testing.assert_array_equal, state, small_state(3))
    with mirror.workdir(url) as workdir:
        params, metadata = checkpoint.load_params(workdir, step="best")
        assert metadata["step"] == 1
        np.testing.assert_array_equal(params["a.kernel"], small_state(1).params["a.kernel"])


def test_a_card_does_not_tell_of_buckets():
    run = object.__new__(Run)
    object.__setattr__(run, "config", ConfigDict({"pretrained": "gs://bucket/models/sdxl"}))
    assert model_card.base_model(run) == "sdxl"


# --- the main job --------------------------------------------------------------------------------

RECIPE = """
from r0_jax import config as base

def get_config():
    config = base.get_config()
    config.pretrained = "s3://bucket/sd"
    config.data.prompts = "s3://bucket/prompts.txt"
    with config.unlocked():
        config.rewards.clip = base.reward_entry("clip_score", path="s3://bucket/clip")
    config.regularizers.weight.weight = 1e-3
    config.batch_size, config.sampler.num_steps, config.objective.grad_steps = 4, 1, 1
    config.lora.rank, config.eval_every, config.checkpoint_every = 4, 1000, 1
    config.eval.num_prompts = config.eval.grid = 4
    config.eval.term_norms = False
    config.compilation_cache = {folder!r} + "/compiled"
    return config
"""


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_killed_and_continued_on_another_machine(tmp_path):
    bucket = tmp_path / "store" / "bucket"
    miniature.write(bucket / "sd", "StableDiffusionPipeline")
    miniature_reward.write_reward(bucket / "clip", "clip_score", 0)
    (bucket / "prompts.txt").write_text("\n".join(f"a red circle {i}" for i in range(9)))
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path)))

    def start(machine, *flags):
        env = dry_runs.environment() | {"XDG_CACHE_HOME": str(tmp_path / machine)}
        return subprocess.Popen(
            [sys.executable, STORE, str(tmp_path / "store"), *flags],
            cwd=dry_runs.ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(machine, steps):
        return start(
            machine,
            "r0_jax.main",
            f"--config={tmp_path / 'recipe.py'}",
            "--workdir=s3://bucket/runs/w",
            f"--config.steps={steps}",
        )

    def steps():
        return [
            int(path.parts[-3])
            for path in (bucket / "runs/w/checkpoints").glob("*/metrics/metrics")
        ]

    process = train("one", 10**6)
    wait_for(lambda: max(steps(), default=0) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last = max(steps())
    shutil.rmtree(tmp_path / "one")  # that machine is gone

    process = train("two", last + 2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = [
        json.loads(line) for line in (bucket / "runs/w/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, last + 3))
    assert max(steps()) == last + 2
    assert (bucket / "runs/w/report.html").stat().st_size > 10_000
    assert json.loads((bucket / "runs/w/config.json").read_text())["pretrained"] == "s3://bucket/sd"

    process = start(
        "three",
        "r0_jax.sample",
        "--workdir=s3://bucket/runs/w",
        "--batch_size=2",
        "--prompts=s3://bucket/prompts.txt",
        f"--out={tmp_path / 'drawn'}",
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 9


def test_a_workdir_that_cannot_be_reached_is_one_line(tmp_path):
    (tmp_path / "store").mkdir()
    result = subprocess.run(
        [
            sys.executable,
            STORE,
            str(tmp_path / "store"),
            "r0_jax.main",
            "--config=configs/shapes_r0.py",
            "--workdir=gs://none/w",
        ],
        cwd=dry_runs.ROOT,
        env=dry_runs.environment() | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if line]
    assert line == (
        "error: gs://none/w: there is no such bucket or object (The bucket none does not exist)"
    )


def test_the_store_of_these_tests_is_not_left_behind():
    assert STORE_ROOT not in os.environ


@pytest.mark.parametrize("value", ["", "cache"])
def test_an_empty_or_relative_cache_counts_as_not_set(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert remote.cache() == tmp_path / ".cache" / "r0_jax"


@pytest.mark.parametrize("there", ["nothing", "open to others", "a link", "of another user"])
def test_a_home_that_cannot_be_written_has_a_private_cache(tmp_path, monkeypatch, there):
    access, home, user = os.access, tmp_path / "home", os.getuid()
    home.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # The test may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != home and access(path, mode))
    private = tmp_path / f"r0_jax-{user}"
    if there == "nothing":
        for _ in range(2):
            with pytest.warns(UserWarning, match=f"{home}.* is not writable: the cache is in"):
                assert remote.cache() == private
        assert private.stat().st_mode & 0o777 == 0o700
        return
    if there == "a link":
        private.symlink_to(home)
    elif there == "open to others":
        private.mkdir()
        private.chmod(0o777)
    else:
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        private = tmp_path / f"r0_jax-{user + 1}"
        private.mkdir(mode=0o700)
    with pytest.raises(InputError, match="not a private folder of this user: set XDG_CACHE_HOME"):
        remote.cache()
