"""Paths as people type them."""

import os
from pathlib import Path

import pytest

from r0_jax import paths


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_home_folder_is_expanded_at_the_beginning_alone(home):
    assert paths.expand("~/a") == f"{home}/home/a"
    for same in ("a/~/b", "./~", "", "gs://bucket/~"):
        assert paths.expand(same) == same


def test_a_relative_path_begins_in_the_current_folder(home):
    assert paths.absolute("a/b") == paths.absolute("./a/b/") == f"{home}/work/a/b"
    assert paths.absolute("../a") == f"{home}/work/../a"  # a link may stand before ..
    assert paths.absolute("~/a") == f"{home}/home/a"
    assert paths.absolute("/a") == "/a"


@pytest.mark.parametrize("url", ["gs://b/x", "s3://b/x/", "gs:/b/x", "http://host/x", ""])
def test_urls_and_nothing_stay(url):
    assert paths.absolute(url) == paths.real(url) == url


def test_one_file_has_one_real_spelling(home):
    Path("link").symlink_to(home / "home")
    spelled = ["~/a", "link/a", "../home/a", f"{home}/home/a", "link/../home/./a"]
    assert {paths.real(path) for path in spelled} == {os.path.realpath(home / "home" / "a")}
