"""Files of others: links, names and pipes; and temporary files of ours."""

import errno
import os
import shutil

import pytest

from r0_jax import files
from r0_jax.errors import InputError, explain


def test_links_lead_inside_the_folder_or_into_the_hubs_cache(tmp_path):
    model = tmp_path / "models--a--b"
    folder = model / "snapshots" / "0123"
    for made in (folder / "unet", model / "blobs", tmp_path / "models--c--d" / "blobs"):
        made.mkdir(parents=True)
    for path in (folder / "own", model / "blobs" / "sha", tmp_path / "models--c--d/blobs/sha"):
        path.write_text("x", "utf-8")
    (model / "refs").write_text("x", "utf-8")

    def linked(target):
        (folder / "unet" / "x").unlink(missing_ok=True)
        (folder / "unet" / "x").symlink_to(target)
        return folder / "unet" / "x"

    (tmp_path / "chosen").symlink_to(folder)  # the folder that the user names may be a link
    for target in ("../own", "../../../blobs/sha", model / "blobs" / "sha"):
        files.check_link(linked(target), folder)
        files.check_link(tmp_path / "chosen" / "unet" / "x", tmp_path / "chosen")
    (model / "blobs" / "on").symlink_to("/etc/passwd")
    for target in (
        "../../../refs",
        "../../../blobs/on",
        "../../../../models--c--d/blobs/sha",
        "/etc/passwd",
        "../../0124/x",
    ):
        with pytest.raises(InputError, match="unet/x is a link that leads out of"):
            files.check_link(linked(target), folder)


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    for path in (tmp_path / "a.json", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe or a device"):
            files.read_json(path)


def test_a_temporary_name_cannot_be_guessed(tmp_path, monkeypatch):
    names = {files.temporary_name(tmp_path / "a.json").name for _ in range(10)}
    assert len(names) == 10 and all(files.is_temporary(name) for name in names)
    # Nor is a link there followed, if it is guessed anyway.
    trap = tmp_path / ".a.json.x.tmp"
    trap.symlink_to(tmp_path / "victim")
    monkeypatch.setattr(files, "temporary_name", lambda path: trap)
    with pytest.raises(InputError, match=r"cannot write .*a\.json: File exists"):
        files.write_bytes(tmp_path / "a.json", b"x")
    assert not (tmp_path / "victim").exists()


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    files.write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a", "usual"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_builds_is_not(tmp_path):
    out = tmp_path / "out [1]"  # whose name is a pattern
    with files.building(out) as living:
        (living / "a").write_text("")
        dead = files.temporary_name(out)
        dead.mkdir()
        (dead / "large").write_text("")
        other = tmp_path / ".out [1].notes.tmp"  # no name of ours
        other.write_text("")
        with files.building(out) as second:
            assert second.is_dir() and living.is_dir() and not dead.exists() and other.exists()
        (living / "b").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name]


def test_a_full_disk_is_told_of_what_is_written(tmp_path, monkeypatch):
    (tmp_path / "source").write_text("x")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", source)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError) as raised:
        files.copy_file(tmp_path / "source", tmp_path / "target", tmp_path)
    assert explain(raised.value)[1].startswith(f"{tmp_path / 'target'}: no space left")
    with pytest.raises(InputError, match=r"cannot write .*/out: no space left"):
        with files.building(tmp_path / "out") as folder:
            raise OSError(errno.ENOSPC, "No space left on device")  # as of a write, without a name
    assert not folder.exists()
