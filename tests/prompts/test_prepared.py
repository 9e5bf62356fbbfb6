import shutil

import pytest

from r0_jax.errors import InputError
from r0_jax.prompts import dataset, prepared


def test_prompts_whose_removal_was_killed_are_removed_by_the_next_start(tmp_path, monkeypatch):
    folder, left = tmp_path / "prompts", tmp_path / "prompts.removed"
    dataset.prepare({"prompt": ["a", "b"]}, folder)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        prepared.remove(folder)
    assert not folder.exists() and left.exists()  # not half a folder that nobody knows
    prepared.remove(folder)
    assert not left.exists()


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(InputError, match="does not hold a run's prompts"):
        prepared.remove(tmp_path / "prompts")
    assert (tmp_path / "prompts" / "thesis.txt").exists()
