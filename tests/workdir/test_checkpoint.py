import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fast_xla
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging

from r0_jax.errors import InputError
from r0_jax.method import train_state
from r0_jax.parallel import checksum, sharding
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.workdir import checkpoint, orbax_path
from r0_jax.workdir.checkpoint import load_params
from r0_jax.workdir.checkpoint_manager import Checkpoints
from r0_jax.workdir.workdir import LocalWorkdir

ROOT = Path(__file__).parents[2]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
RULES = [(".*", "fsdp")]


def init(key, width=2048):
    """A state whose every leaf is another; one kernel is large enough to be split."""
    params = {
        "down_blocks.0.to_q.lora_A": jax.random.normal(key, (width, 640)),
        "norm.scale": jnp.arange(7.0),
        "half.bias": jnp.arange(5, dtype=jnp.bfloat16),
    }
    state = train_state.init(params, OPTIMIZER)
    ema_params = jax.tree.map(lambda x: 0.5 * x, params)
    opt_state = jax.tree.map(lambda x: x + 3, state.opt_state)
    return state._replace(ema_params=ema_params, opt_state=opt_state)


def target(count, width=2048, **shape):
    """What to restore onto a mesh of `count` devices."""
    mesh = sharding.make_mesh(shape or {"data": -1}, jax.devices()[:count])
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), width))
    return sharding.with_sharding(
        shapes, sharding.follow_params(shapes, shapes.params, mesh, RULES)
    )


@pytest.fixture(scope="module")
def state():
    where = jax.tree.map(lambda x: x.sharding, target(8, data=2, fsdp=4))
    return jax.jit(init, out_shardings=where)(jax.random.key(1))


@pytest.fixture(scope="module")
def small():
    return jax.jit(lambda key: init(key, width=2))(jax.random.key(1))


def at(state, step):
    return state._replace(step=state.step.at[()].set(step))


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def files(folder):
    return sorted(
        (p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def flip_a_bit(path, *, of_each=2**40):
    data = bytearray(path.read_bytes())
    for middle in range(min(of_each, len(data)) // 2, len(data), of_each):
        data[middle] ^= 16
    path.write_bytes(data)


def change(path, before, after):
    text = path.read_text("utf-8")
    assert before in text
    path.write_text(text.replace(before, after), "utf-8")


@contextlib.contextmanager
def run(program, *arguments):
    """A process of its own with one device, to be killed or to run into a full disk."""
    header = (
        "import sys; sys.path[:0] = ['tests/support', 'tests/workdir']\n"
        "import test_checkpoint as t\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", header + program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast_xla.FLAGS},
    ) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A workdir with steps 10 and 20, made on 2 x 4 devices; tests copy it before they harm it."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(LocalWorkdir(workdir), config_digest="abc") as checkpoints:
        checkpoints.save(at(state, 10))
        checkpoints.save(at(state, 20))
        checkpoints.add_metrics(20, {"heldout/clip": jnp.float32(0.5), "bad": float("nan")})
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1, {}), (2, {"data": -1}), (4, {"fsdp": -1}), (8, {"data": 4, "fsdp": 2}), (8, {"fsdp": -1})],
)
def test_restores_onto_any_mesh(saved, state, count, shape):
    wanted = target(count, **shape)
    with Checkpoints(LocalWorkdir(saved)) as checkpoints:
        restored, metadata = checkpoints.restore(wanted)
    assert same(restored, at(state, 20))
    for array, struct in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert array.sharding == struct.sharding
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert metadata["step"] == 20 and metadata["config_digest"] == "abc"
    assert metadata["metrics"] == {"heldout/clip": 0.5, "bad": None}


def test_a_step_that_is_asked_for(saved, state):
    with Checkpoints(LocalWorkdir(saved)) as checkpoints:
        assert checkpoints.latest_step() == 20
        assert int(checkpoints.restore(target(1), step=10)[0].step) == 10
        with pytest.raises(InputError, match=r"no checkpoint of step 15; it has \[10, 20\]"):
            checkpoints.restore(target(1), step=15)


def test_a_donated_state_is_saved_as_it_was(tmp_path, state):
    # The save goes on while the next step overwrites the buffers that it was given.
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    current = jax.jit(lambda s: jax.tree.map(jnp.copy, s))(at(state, 0))
    with Checkpoints(LocalWorkdir(tmp_path), keep=4) as checkpoints:
        for _ in range(4):
            checkpoints.save(current)
            for _ in range(5):
                current = step(current)
    for saved_step in (0, 15):
        with Checkpoints(LocalWorkdir(tmp_path)) as checkpoints:
            restored, _ = checkpoints.restore(target(8, data=2, fsdp=4), step=saved_step)
        expected = at(state, 0)
        for _ in range(saved_step):
            expected = jax.tree.map(lambda x: x + 1, expected)
        assert same(restored, expected)


def test_keeps_the_newest_and_the_best(tmp_path, small):
    scores = [0.1, 0.9, 0.3, None, float("nan"), 0.2]
    with Checkpoints(LocalWorkdir(tmp_path), keep=2) as checkpoints:
        for step, score in enumerate(scores):
            assert checkpoints.save(at(small, step))
            assert not checkpoints.save(at(small, step))  # there already
            if score is not None:
                checkpoints.add_metrics(step, {"heldout/clip": 5.0}, score)
        checkpoints.wait()
    assert checkpoint.steps(LocalWorkdir(tmp_path)) == [1, 4, 5]
    assert checkpoint.find_step(LocalWorkdir(tmp_path), "best") == 1
    # A later run knows the best one of the former.
    with Checkpoints(LocalWorkdir(tmp_path), keep=2) as checkpoints:
        for step, score in ((6, 0.8), (7, 1.0)):
            checkpoints.save(at(small, step))
            checkpoints.add_metrics(step, {"heldout/clip": 5.0}, score)
        checkpoints.save(at(small, 8))
        checkpoints.save(at(small, 9))
        checkpoints.wait()
        assert int(checkpoints.restore(target(1, width=2), "best")[0].step) == 7
    assert checkpoint.steps(LocalWorkdir(tmp_path)) == [7, 8, 9]
    assert load_params(LocalWorkdir(tmp_path), step="best")[1]["step"] == 7


def test_a_workdir_whose_name_is_a_pattern(tmp_path, small):
    for name in ("runs [v2]", "run[0-9]", "a*", "a?", "{b}"):
        workdir = LocalWorkdir(tmp_path / name / "['aes']")
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(at(small, 3))
        assert load_params(workdir)[1]["step"] == 3
        with Checkpoints(workdir) as checkpoints:
            assert same(checkpoints.restore(target(1, width=2))[0], at(small, 3))
    assert os.listdir(tmp_path / "a*" / "['aes']" / "checkpoints") == ["3"]


def test_orbax_path_escapes_its_own_name_alone(tmp_path):
    for name in ("a*", "ab", "a[b]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.1").touch()
    for name in ("a*", "a[b]"):
        folder = orbax_path.of(tmp_path / name)
        assert [str(path) for path in folder.glob("x.*")] == [str(tmp_path / name / "x.1")]
        assert [str(path) for path in (folder / ".").glob("x.*")] == [str(tmp_path / name / "x.1")]


def test_the_best_may_be_unknown(saved):
    with pytest.raises(InputError, match="leave the step out"):
        checkpoint.find_step(LocalWorkdir(saved), "best")  # saved with no score


def test_ema_alone_for_export(saved, state, copied):
    params, metadata = load_params(LocalWorkdir(saved))
    assert metadata["step"] == 20
    assert set(params) == set(state.ema_params)
    for name, array in params.items():
        assert isinstance(array, np.ndarray) and array.dtype == state.params[name].dtype
        assert np.array_equal(array, state.ema_params[name])
    params, metadata = load_params(LocalWorkdir(saved), "params", step=10)
    assert metadata["step"] == 10
    assert np.array_equal(params["norm.scale"], state.params["norm.scale"])
    # Nothing else is read, and nothing is written.
    before = [(p, p.stat().st_mtime_ns) for p in files(copied)]
    load_params(LocalWorkdir(copied))
    assert before == [(p, p.stat().st_mtime_ns) for p in files(copied)]


@pytest.mark.parametrize("step", [None, 20])
def test_what_does_not_fit_is_named(saved, step):
    with Checkpoints(LocalWorkdir(saved)) as checkpoints:
        with pytest.raises(InputError) as wider:
            checkpoints.restore(target(1, width=1024), step)
        renamed = target(1)
        renamed.params["other.scale"] = renamed.params.pop("norm.scale")
        with pytest.raises(InputError) as other:
            checkpoints.restore(renamed, step)
        half = target(1)
        where = half.params["norm.scale"].sharding
        half.params["norm.scale"] = jax.ShapeDtypeStruct((7,), jnp.bfloat16, sharding=where)
        with pytest.raises(InputError) as dtype:
            checkpoints.restore(half, step)
    name = "ema_params.down_blocks.0.to_q.lora_A"
    assert f"{name} is float32[2048, 640] there and float32[1024, 640] here" in str(wider.value)
    assert "(and 3 more)" in str(wider.value)
    assert "params.norm.scale is float32[7] there and absent here" in str(other.value)
    assert "params.norm.scale is float32[7] there and bfloat16[7] here" in str(dtype.value)
    assert checkpoint.steps(LocalWorkdir(saved)) == [10, 20]  # it is not taken for damage


def test_no_checkpoint(tmp_path):
    with Checkpoints(LocalWorkdir(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(InputError, match="no checkpoint"):
            checkpoints.restore(target(1))
    checkpoints.close()  # twice does no harm
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_params(LocalWorkdir(tmp_path))
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_params(LocalWorkdir(tmp_path / "nowhere"))


def arrays(step):
    return [path for path in files(step / "state") if path.stat().st_size > 10_000]


def replace(path, text):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if text is None else path.write_text(text, "utf-8")


HARM = {
    # Of each KiB: a reader of one field does not see a bit in another, and their order in a file
    # is orbax's own.
    "flipped bits in the arrays": lambda step: [flip_a_bit(f, of_each=1024) for f in arrays(step)],
    "half the arrays": lambda step: [os.truncate(f, 5000) for f in arrays(step)],
    "no arrays": lambda step: [f.unlink() for f in arrays(step)],
    "empty files": lambda step: [os.truncate(f, 0) for f in files(step)],
    "no index": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "half the names": lambda step: os.truncate(step / "state" / "_METADATA", 300),
    "another number": lambda step: change(step / "metrics" / "metrics", "0.5", "0.7"),
    "half the metadata": lambda step: os.truncate(step / "metrics" / "metrics", 30),
    "a folder for the metadata": lambda step: replace(step / "metrics" / "metrics", None),
    "a file for its folder": lambda step: replace(step / "metrics", "x"),
    "metadata without an end": lambda step: replace(step / "metrics" / "metrics", "[" * 100_000),
    "nothing": lambda step: [shutil.rmtree(f) for f in step.iterdir() if f.is_dir()],
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied, state, harm, caplog, capfd):
    folder = copied / "checkpoints" / "20"
    HARM[harm](folder)
    with pytest.raises(InputError, match=rf"checkpoint {folder} is damaged"):
        load_params(LocalWorkdir(copied), "params", 20)
    assert folder.exists()  # a reader changes nothing
    logging.get_absl_logger().propagate = True
    with Checkpoints(LocalWorkdir(copied), keep=2) as checkpoints:
        restored, metadata = checkpoints.restore(target(2, data=-1))
        assert same(restored, at(state, 10)) and metadata["step"] == 10
        assert checkpoints.latest_step() == 10
        checkpoints.save(at(state, 15))
        checkpoints.save(at(state, 20))  # comes this way again
    (copied / "checkpoints" / "99").write_text("mine", "utf-8")  # a file is no checkpoint
    assert checkpoint.steps(LocalWorkdir(copied)) == [15, 20]
    assert folder.with_name("20.damaged").exists()  # nothing of the user's is deleted
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"checkpoint {folder} is damaged" in said and "20.damaged" in said
    assert "Traceback" not in capfd.readouterr().err + said


def test_sigterm_while_a_checkpoint_is_read_is_no_damage(copied, monkeypatch):
    def come(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "metadata", come)
    with pytest.raises(Stopped), StopSignal(), Checkpoints(LocalWorkdir(copied)) as checkpoints:
        checkpoints.restore(target(1))
    assert checkpoint.steps(LocalWorkdir(copied)) == [10, 20]


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (PermissionError(errno.EACCES, "no"), False),
        (ValueError("PERMISSION_DENIED: [os_error_code='13']"), False),
        (ValueError("[os_error_code='116']"), False),  # a stale handle of a network's file system
        (ValueError("[os_error_code='5']"), True),
        (ValueError("out of bounds"), True),
    ],
)
def test_what_forbids_reading_is_no_damage(tmp_path, error, is_damage):
    found = checkpoint._unreadable(tmp_path / "3", error)
    assert type(found) is (checkpoint.DamagedError if is_damage else InputError)


def test_too_little_memory_is_no_damage(tmp_path):
    error = MemoryError()
    assert checkpoint._unreadable(tmp_path / "3", error) is error  # told as what it is


def test_a_damaged_step_that_was_asked_for_is_an_error(copied):
    folder = copied / "checkpoints" / "10"
    flip_a_bit(files(folder / "state")[-1])
    with Checkpoints(LocalWorkdir(copied)) as checkpoints:
        with pytest.raises(InputError, match=f"{folder} is damaged .*checksums differ"):
            checkpoints.restore(target(1), step=10)
        flip_a_bit(files(folder.with_name("20") / "state")[-1])
        with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
            checkpoints.restore(target(1))
    assert checkpoint.steps(LocalWorkdir(copied)) == []
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read: restore one from"):
        checkpoint.is_begun(LocalWorkdir(copied))  # which another start would not begin anew


def test_what_is_not_named_as_a_step_is_none(copied):
    for name in ("0030", "\N{ARABIC-INDIC DIGIT FOUR}", "40.damaged"):
        shutil.copytree(copied / "checkpoints" / "20", copied / "checkpoints" / name)
    assert checkpoint.steps(LocalWorkdir(copied)) == [10, 20]
    assert checkpoint.is_begun(LocalWorkdir(copied))


def test_killed_in_the_middle_of_a_save(tmp_path, state):
    # Step 1 is whole; step 2 is large, and the kill comes when its first files are there.
    program = """
import os, pathlib, signal, numpy as np
state = t.init(t.jax.random.key(1))
checkpoints = t.Checkpoints(t.LocalWorkdir(t.Path(sys.argv[1])))
checkpoints.save(t.at(state, 1))
noise = np.random.default_rng(0).standard_normal((8, 2**20), np.float32)  # 32 MB, hardly packs
big = {f"big.{i}": t.jnp.asarray(x) for i, x in enumerate(noise)}
checkpoints.save(t.at(state._replace(params=big), 2))
while not any(p.is_file() for p in (checkpoints.folder / "2.orbax-checkpoint-tmp").rglob("*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    with run(program, tmp_path) as child:
        out, err = child.communicate(timeout=60)
    assert (out, err, child.returncode) == ("", "", -signal.SIGKILL)
    assert set(os.listdir(tmp_path / "checkpoints")) == {"1", "2.orbax-checkpoint-tmp"}
    assert checkpoint.steps(LocalWorkdir(tmp_path)) == [1]
    assert load_params(LocalWorkdir(tmp_path))[1]["step"] == 1
    with Checkpoints(LocalWorkdir(tmp_path)) as checkpoints:
        restored, _ = checkpoints.restore(target(1))
        assert same(restored, at(init(jax.random.key(1)), 1))
        checkpoints.save(at(state, 3))
    assert set(os.listdir(tmp_path / "checkpoints")) == {"1", "3"}  # the rest is swept away
    assert load_params(LocalWorkdir(tmp_path))[1]["step"] == 3


def test_one_device_goes_on_from_eight_and_sigterm_waits_for_the_save(copied):
    program = """
import signal, time, numpy as np
class Stop(Exception): pass
def stop(*_): raise Stop
signal.signal(signal.SIGTERM, stop)
try:
    with t.Checkpoints(t.LocalWorkdir(t.Path(sys.argv[1]))) as checkpoints:
        state, _ = checkpoints.restore(t.target(1))
        noise = np.random.default_rng(0).standard_normal((8, 2**20), np.float32)
        big = {f"big.{i}": t.jnp.asarray(x) for i, x in enumerate(noise)}
        checkpoints.save(t.at(state._replace(params=big), int(state.step) + 1))
        print(len(t.jax.devices()), "device, saving", flush=True)
        while True:
            time.sleep(0.1)  # a signal just before a long sleep does not shorten it
except Stop:
    print("stopped")
"""
    with run(program, copied) as child:
        assert child.stdout.readline() == "1 device, saving\n", child.stderr.read()
        child.terminate()
        out, err = child.communicate(timeout=60)
    assert (out, err, child.returncode) == ("stopped\n", "", 0)
    assert set(os.listdir(copied / "checkpoints")) == {"10", "20", "21"}
    assert len(load_params(LocalWorkdir(copied), "params")[0]) == 8


REFUSED = """
import os, resource
from r0_jax.errors import InputError
state = t.init(t.jax.random.key(1))

def full(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

def fail(how):
    with t.Checkpoints(t.LocalWorkdir(t.Path(sys.argv[1], how))) as checkpoints:
        checkpoints.save(t.at(state, 1))
        checkpoints.wait()
        if how == "read-only":
            os.chmod(checkpoints.folder, 0o555)
            if os.geteuid() == 0:  # root may write everywhere: be somebody else
                os.chown(checkpoints.folder, 65534, 65534)
                os.seteuid(65534)
        else:
            full({"full": 100_000, "fuller": 60}[how])
        checkpoints.save(t.at(state, 2))
        checkpoints.save(t.at(state, 3))

for how in ("read-only", "full", "fuller"):
    try:
        fail(how)
    except InputError as error:
        print(how, error, file=sys.stderr)
    finally:
        os.seteuid(os.getuid())
        full(resource.RLIM_INFINITY)
"""


def test_what_the_disk_refuses_is_one_line():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        folder = Path(folder).resolve()
        os.chmod(folder, 0o755)
        with run(REFUSED, folder) as child:
            out, err = child.communicate(timeout=60)  # and the process does end
        lines = err.splitlines()
        for how, reason in [
            ("read-only", "permission denied"),
            ("full", "file too large"),
            ("fuller", "file too large"),
        ]:
            where = folder / how / "checkpoints"
            said = f"{how} cannot write a checkpoint to {where}: {reason}; older checkpoints "
            assert lines.pop(0).startswith(said), err
            os.chmod(where, 0o755)
            assert checkpoint.steps(LocalWorkdir(folder / how)) == [1]
            # With room again it resumes.
            with Checkpoints(LocalWorkdir(folder / how)) as checkpoints:
                assert int(checkpoints.restore(target(1))[0].step) == 1
        assert out == "" and not lines


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot write a checkpoint to .*not a directory"):
        Checkpoints(LocalWorkdir(tmp_path / "file" / "run"))


def test_metadata_is_plain_json(saved):
    path = saved / "checkpoints" / "20" / "metrics" / "metrics"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    assert metadata.keys() - checkpoint.read_metadata(LocalWorkdir(saved), 20).keys() == {"seal"}
    # Empty: no reward needs its spread, and no regularizer a fake score.
    fields = set(train_state.TrainState._fields) - {"moments", "fake"}
    assert set(metadata["checksums"]) == fields


def test_checksum_sees_a_bit_a_swap_and_a_name_but_not_the_sharding(state):
    mesh = sharding.make_mesh({"fsdp": -1})
    where = sharding.batch_sharding(mesh)
    x = np.random.default_rng(0).standard_normal((64, 3), np.float32)
    value = checksum.of_fields({"params.a": x})
    assert value == checksum.of_fields({"params.a": jax.device_put(x, where)})
    for change in (
        lambda y: y.view(np.uint32).__setitem__((5, 1), y.view(np.uint32)[5, 1] ^ 1),
        lambda y: y.view(np.uint32).__setitem__((0, 0), y.view(np.uint32)[0, 0] ^ (1 << 31)),
        lambda y: y.__setitem__([3, 9], y[[9, 3]]),
    ):
        changed = x.copy()
        change(changed)
        assert checksum.of_fields({"params.a": changed}) != value
    assert checksum.of_fields({"params.b": x}) != value
    assert checksum.of_fields({"params.a": x.reshape(3, 64)}) == value  # shapes are checked apart


def test_a_damaged_best_checkpoint_is_told_and_so_is_a_renamed_one(copied):
    workdir = LocalWorkdir(copied)
    shutil.move(copied / "checkpoints" / "10", copied / "checkpoints" / "15")
    with pytest.warns(UserWarning, match=r"15 is damaged .*step 10, renamed.*may be the best"):
        checkpoint.scores(workdir)
    with pytest.raises(InputError, match=r"checkpoints/15 is damaged"):
        load_params(workdir, step=15)


def test_an_old_checkpoint_on_another_disk_is_unlinked_when_it_is_due(tmp_path, small):
    workdir = LocalWorkdir(tmp_path / "run")
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(at(small, 1))
    shutil.move(workdir.checkpoints / "1", tmp_path / "disk")
    (workdir.checkpoints / "1").symlink_to(tmp_path / "disk")
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(at(small, 2))
    assert os.listdir(workdir.checkpoints) == ["2"] and (tmp_path / "disk").is_dir()


def test_metadata_that_is_a_pipe_is_not_opened(copied):
    path = copied / "checkpoints" / "10" / "metrics" / "metrics"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is a pipe or a device"):
        checkpoint.read_metadata(LocalWorkdir(copied), 10)
