"""Files of others: links, names and pipes; and temporary files of ours."""

import os

import pytest

from r0_jax import files
from r0_jax.errors import InputError


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
