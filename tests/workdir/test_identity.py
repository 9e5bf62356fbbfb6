import json
import math

import pytest
from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.workdir import identity, run
from r0_jax.workdir.workdir import LocalWorkdir


def config(**changes):
    fields = {
        "steps": 100,
        "seed": 0,
        "checkpoint_every": 10,
        "mesh": {"data": -1},
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "rewards": {"clip_score": {"weight": 1.0}},
        "sharding": (("norm.*", "replicate"), (".*", "fsdp")),
        "pretrained": None,
        "wandb": False,
    }
    c = ConfigDict(fields)
    for name, value in changes.items():
        *path, last = name.split("__")
        part = c
        for key in path:
            part = part[key]
        part[last] = value
    return c


def begun(tmp_path, **changes):
    """A workdir with a checkpoint."""
    identity.check_same_run(LocalWorkdir(tmp_path), config(**changes))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return tmp_path


def test_writes_the_resolved_config(tmp_path):
    folder = tmp_path / "new" / "run"
    identity.check_same_run(LocalWorkdir(folder), config(pretrained="图"))
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written["optimizer"] == {"learning_rate": 1e-4, "schedule": "constant"}
    assert written["sharding"] == [["norm.*", "replicate"], [".*", "fsdp"]]
    assert written["pretrained"] == "图"
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_the_same_config_continues(tmp_path):
    digest = identity.check_same_run(LocalWorkdir(begun(tmp_path)), config())
    assert digest == identity.check_same_run(LocalWorkdir(tmp_path), config())


def test_harmless_fields_may_change_and_are_written(tmp_path):
    changes = dict(steps=200, checkpoint_every=5, mesh={"data": 2, "fsdp": 4}, wandb=True)
    digest = identity.check_same_run(LocalWorkdir(begun(tmp_path)), config())
    assert identity.check_same_run(LocalWorkdir(tmp_path), config(**changes)) == digest
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["steps"] == 200 and written["mesh"] == {"data": 2, "fsdp": 4}


def test_other_fields_may_not(tmp_path):
    before = (begun(tmp_path) / "config.json").read_bytes()
    other = config(optimizer__learning_rate=2e-4, seed=1, steps=7)
    other.rewards = {"aesthetic": {"weight": 1.0}}
    with pytest.raises(InputError) as error:
        identity.check_same_run(LocalWorkdir(tmp_path), other)
    assert str(error.value) == (
        f"{tmp_path} holds a run with another config: "
        "optimizer.learning_rate is 0.0001 there and 0.0002 here; "
        "rewards.aesthetic.weight is absent there and 1.0 here; "
        "rewards.clip_score.weight is 1.0 there and absent here (and 1 more); "
        "set it back to continue that run, or give another --workdir"
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_path_may_be_spelled_in_another_way(tmp_path, monkeypatch):
    """As a run of r0_jax 0.1 has it, which kept paths as they were typed."""
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "run", pretrained="models/a")
    digests = {
        identity.check_same_run(LocalWorkdir(tmp_path / "run"), config(pretrained=path))
        for path in (f"{tmp_path}/models/a", "./models/a", f"{tmp_path}/link/a")
    }
    assert len(digests) == 1
    with pytest.raises(InputError, match=f"pretrained is .*link/a.* there and .*{tmp_path}/b"):
        identity.check_same_run(LocalWorkdir(tmp_path / "run"), config(pretrained=f"{tmp_path}/b"))


def test_steps_matter_where_the_learning_rate_decays_towards_them(tmp_path):
    begun(tmp_path, optimizer__schedule="cosine")
    with pytest.raises(InputError, match="steps is 100 there and 200 here"):
        identity.check_same_run(
            LocalWorkdir(tmp_path), config(optimizer__schedule="cosine", steps=200)
        )


def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path):
    first = identity.check_same_run(LocalWorkdir(tmp_path), config())
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)
    second = identity.check_same_run(LocalWorkdir(tmp_path), config(seed=1))
    assert first != second
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["seed"] == 1


@pytest.mark.parametrize("text", ["", '{"steps": 1', None])
def test_a_config_that_cannot_be_read(tmp_path, text):
    path = begun(tmp_path) / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json is (not JSON|missing)"):
        identity.check_same_run(LocalWorkdir(tmp_path), config())


@pytest.mark.parametrize("text", ['{"model_type": "clip"}', "[1]"])
def test_the_config_of_something_else_is_not_overwritten(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="give another --workdir"):
        identity.check_same_run(LocalWorkdir(tmp_path), config())
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == text


def test_processes_with_other_flags_or_another_disk_are_told(tmp_path, monkeypatch):
    identity.check_same_everywhere(config())  # alone
    tmp_path.mkdir(exist_ok=True)
    identity.check_shared(LocalWorkdir(tmp_path))
    assert not list(tmp_path.iterdir())

    first = config().to_dict() | {"steps": 123456}
    monkeypatch.setattr("r0_jax.parallel.distributed.of_first", lambda make: first)
    with pytest.raises(InputError, match=f"steps is {config().steps} in this process and 123456"):
        identity.check_same_everywhere(config())
    monkeypatch.setattr("r0_jax.parallel.distributed.of_first", lambda make: "a token of process 0")
    monkeypatch.setattr(identity, "_SEEN", 0)
    with pytest.raises(InputError, match="on a file system that all processes share"):
        identity.check_shared(LocalWorkdir(tmp_path))


def test_a_config_that_is_a_folder_or_too_deep_is_named(tmp_path):
    path = begun(tmp_path) / "config.json"
    path.write_text("[" * 100_000, "utf-8")
    with pytest.raises(InputError, match="is not JSON; bring it back"):
        identity.check_same_run(LocalWorkdir(tmp_path), config())
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="is a folder; bring it back"):
        identity.check_same_run(LocalWorkdir(tmp_path), config())


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with identity.alone(folder):
        with (
            pytest.raises(InputError, match="another process is training in"),
            identity.alone(folder),
        ):
            pass
    with identity.alone(folder):  # free again
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("", "utf-8")
    with (
        pytest.raises(InputError, match=r"file.* cannot be written to"),
        identity.alone(tmp_path / name),
    ):
        pass


def test_an_edited_config_is_noticed(tmp_path):
    whole, workdir, path = base.get_config(), LocalWorkdir(tmp_path), tmp_path / "config.json"
    identity.check_same_run(workdir, whole)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    sealed = json.loads(path.read_text("utf-8"))
    assert run.read_config(tmp_path).seed == sealed["seed"] == 0

    path.write_text(json.dumps(sealed | {"seed": 1}), "utf-8")
    with pytest.raises(InputError, match="is not the config of a run: bring the original back"):
        run.read_config(tmp_path)
    with pytest.raises(InputError, match="is not what the run wrote: it was edited"):
        identity.check_same_run(workdir, whole)

    del sealed["seal"]  # runs of r0_jax 0.1 have none
    path.write_text(json.dumps(sealed | {"lora": sealed["lora"] | {"alpha": math.nan}}), "utf-8")
    with pytest.raises(InputError, match=r"lora\.alpha = nan"):
        run.read_config(tmp_path)
    path.write_text(json.dumps(sealed), "utf-8")
    identity.check_same_run(workdir, whole)
    assert "seal" in json.loads(path.read_text("utf-8"))
