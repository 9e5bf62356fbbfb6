"""A folder that plays gs:// and s3:// for fsspec: its folders are the buckets.

In a test the fixture `store`; for a whole program:

    python tests/support/object_store.py ROOT MODULE FLAGS
"""

import os
import runpy
import sys
import types

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from r0_jax import remote

ROOT = "R0_JAX_TEST_STORE"  # of the environment


class Store(DirFileSystem):
    protocol = ("gs", "gcs", "s3")
    cachable = False

    def __init__(self, **options):
        super().__init__(os.environ[ROOT], LocalFileSystem(auto_mkdir=True))

    def find(self, path, **options):
        self._check(path)
        return super().find(path, **options)

    def pipe_file(self, path, value, **options):
        self._check(path)
        super().pipe_file(path, value, **options)

    def _check(self, path):
        bucket = self._strip_protocol(path).split("/")[0]
        if not os.path.isdir(os.path.join(self.path, bucket)):
            raise FileNotFoundError(f"The bucket {bucket} does not exist")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder of buckets, with an empty one; the user's cache is empty too."""
    monkeypatch.setenv(ROOT, str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    for scheme in Store.protocol:
        monkeypatch.setitem(_registry, scheme, Store)
    for name in ("google.cloud", "google.cloud.storage"):  # which come with gcsfs
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    backend.fsspec_backend._get_filesystem.cache_clear()
    remote._fetched.cache_clear()
    yield tmp_path / "store"
    backend.fsspec_backend._get_filesystem.cache_clear()
    remote._fetched.cache_clear()


if __name__ == "__main__":
    os.environ[ROOT] = sys.argv[1]
    _registry.update(dict.fromkeys(Store.protocol, Store))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
