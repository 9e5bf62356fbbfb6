"""Paths that orbax reads letter by letter, whatever characters the name of a folder holds."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from r0_jax.workdir.workdir import AnyPath


class _LiteralPath(type(epath.Path("/"))):  # type: ignore[misc]  # of the system: POSIX, Windows
    """A path of this machine whose own name is no pattern in `glob`.

    orbax merges the files of its processes with `glob`, and etils takes the folder's name for a
    part of the pattern. So `runs [v2]` matched nothing, and the checkpoint could not be read.
    `runs*` could match the files of another run. Paths made of this one are of the same class.
    """

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        root = glob.escape(str(self))
        for found in glob.iglob(f"{root}/{pattern}"):
            yield type(self)(found)

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove a folder; of a link to one, say on another disk, the link."""
        if os.path.islink(self):
            self.unlink()
        else:
            super().rmtree(missing_ok)


def of(folder: AnyPath) -> epath.Path:
    """Return the path to give orbax; that of a store is returned as it is."""
    return _LiteralPath(folder) if isinstance(folder, Path) else folder
