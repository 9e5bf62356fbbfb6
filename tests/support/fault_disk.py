"""A disk to fill."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fault_world import Process, World


class Disk:
    """A file system of a chosen size, or, where none may be mounted, a limit on files' sizes."""

    ROOM = 2**28

    def __init__(self, folder: Path, mounted: bool):
        self.folder, self.mounted = folder, mounted
        self.kind = "tmpfs" if mounted else "no root: a limit on the size of files"

    def run(self, world: World, workdir: Path, room: int) -> Process:
        """A run that finds so many bytes free, or may write files of at most so many."""
        if not self.mounted:

            def limit() -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

            return self._ended(world.start(workdir, preexec_fn=limit))
        left = os.statvfs(self.folder)
        used = (left.f_blocks - left.f_bfree) * left.f_frsize
        self._resize(max(used + room, 4096))
        return self._ended(world.start(workdir))

    def start_with_room(self, world: World, workdir: Path) -> Process:
        if self.mounted:
            self._resize(self.ROOM)
        return world.start(workdir)

    def _ended(self, process: Process) -> Process:
        process.wait()
        return process

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={Disk.ROOM}", "tmpfs", folder],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=False)
