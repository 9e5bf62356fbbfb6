"""A workdir in an object store: a folder of this machine that mirrors it.

    with mirror.workdir("gs://bucket/runs/sdxl", training=True) as workdir:
        ...               # read and write files of workdir.path
        workdir.push()    # the store has them too

At the start the mirror takes the state of the store. It does not hold checkpoints of gs://: orbax
writes and reads them in the store, each machine its own part. Orbax cannot do so in s3://, so those
are written to the mirror and pushed whole.
"""

import contextlib
import hashlib
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from r0_jax import remote
from r0_jax.console import console
from r0_jax.errors import InputError
from r0_jax.files import is_temporary
from r0_jax.remote import Stamp
from r0_jax.workdir.workdir import AnyPath, LocalWorkdir, Workdir

_STEP = re.compile(r"checkpoints/\d+/")
# A reader of a run does without these, until it asks for an array.
_LEFT_OUT = re.compile(r"checkpoints/\d+/state/|prompts/|tensorboard/")
# Of a checkpoint: written last and removed first, so that a step without it does not count.
_COMMIT = re.compile(r"checkpoints/\d+/metrics/metrics")
_MADE_ANEW = ("prompts.tmp", "prompts.removed")  # a kill leaves them


@contextlib.contextmanager
def workdir(path: str | os.PathLike, training: bool = False) -> Iterator[Workdir]:
    """Open the folder of a run: the path itself, or the mirror of what it names in a store.

    A mirror is pushed at the end, too. With `training` it keeps other runs of this machine out,
    and what is deleted in the mirror is deleted in the store. All processes call it.
    """
    url = remote.url_of(path)
    if url is None:
        yield LocalWorkdir(Path(path))
        return
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    kind = "workdirs" if training else "read"
    folder = remote.cache() / kind / digest / PurePosixPath(url).name
    with contextlib.ExitStack() as held:
        if training:
            if jax.process_index() == 0:
                held.enter_context(
                    remote.locked(
                        folder.with_name(".lock"),
                        busy=f"another process of this machine is training "
                        f"in {url}: wait for it, or give another --workdir",
                    )
                )
                _try_writing(url)
            _check_machines(url)
        mirrored = MirroredWorkdir(url, folder, training)
        held.callback(mirrored.close)
        _in_turn(mirrored.pull, url)
        console.print(f"{url} is mirrored in {folder}", highlight=False, soft_wrap=True)
        try:
            yield mirrored
        except BaseException:
            with contextlib.suppress(InputError):  # the first problem is the one to tell
                mirrored.push()
            raise
        mirrored.push()


class MirroredWorkdir(Workdir):
    """A folder of this machine and the folder of a store that it mirrors.

    Attributes:
      url: of the folder in the store.
      path: of the folder on this machine.
      same: {name: stamp of the file when both sides were last the same}; None for what is in the
        store only, left there by a kill.
      awaited: the step of the checkpoint that is to be pushed when it is whole.
    """

    is_mirror = True

    def __init__(self, url: str, path: Path, training: bool):
        self.url, self.path, self.training = url, path, training
        self.same: dict[str, Stamp | None] = {}
        self.awaited: int | None = None
        self._has_checkpoints = not remote.orbax_reaches(url)
        self._pushing = threading.Lock()

    @property
    def checkpoints(self) -> AnyPath:
        folder = self.path.resolve() if self._has_checkpoints else remote.folder(self.url)
        return folder / "checkpoints"

    def share(self) -> None:
        if jax.process_count() > 1:
            self.push()
            _in_turn(self.pull, self.url)

    def push_checkpoint(self, step: int) -> None:
        if self._has_checkpoints:
            self.awaited = step
            threading.Thread(target=self._push_when_whole, args=(step,), daemon=True).start()

    def pull_checkpoint(self, step: int) -> None:
        if not self._has_checkpoints:
            return
        name = f"checkpoints/{step}"
        with remote.locked(self.path.with_name(".pull.lock")):
            remote.fetch(
                f"{self.url}/{name}", remote.list_files(f"{self.url}/{name}"), self.path / name
            )

    def pull(self) -> None:
        """Make the mirror what the store holds."""
        there = {
            name: x for name, x in remote.list_files(self.url).items() if self._is_mirrored(name)
        }
        whole = {_step(name) for name in there if _COMMIT.fullmatch(name)}
        wanted = {name: x for name, x in there.items() if _step(name) in whole | {None}}
        with remote.locked(self.path.with_name(".pull.lock")):
            self.path.mkdir(parents=True, exist_ok=True)
            remote.remove_others(self.path, wanted if self.training else there)
            remote.fetch(
                self.url,
                wanted
                if self.training
                else {name: x for name, x in wanted.items() if not _LEFT_OUT.match(name)},
                self.path,
            )
        # A reader changes none of the files that are in the store.
        left = there.keys() - wanted.keys()
        self.same = {**wanted, **dict.fromkeys(left)} if self.training else {**there}

    def push(self) -> None:
        """Make the store what the mirror holds; process 0 does it."""
        if jax.process_index() != 0:
            return
        with self._pushing, remote.told(self.url):
            # Not rglob, which fails where orbax removes a folder meanwhile.
            here = {
                name
                for parent, _, files in os.walk(self.path)
                for file in files
                if self._is_mirrored(name := Path(parent, file).relative_to(self.path).as_posix())
            }
            gone = self.same.keys() - here if self.training else set()
            # A checkpoint is removed as one, though some files of it may still be there.
            steps = {_step(name) for name in gone if self.same[name]} - {None}
            gone |= {name for name in self.same if _step(name) in steps}
            changed = {
                name: stamp
                for name in here
                if _step(name) not in steps
                and (stamp := remote.stamp_of(self.path / name))
                and stamp != self.same.get(name)
            }
            there = self._upload(changed)
            self._delete(gone)
            if there:
                self._note_times({name: changed[name] for name in there})

    def _upload(self, names: Mapping[str, Stamp]) -> set[str]:
        """Upload files; return the names of those that were still there.

        First those outside of checkpoints, so that metrics come before their checkpoint; then
        checkpoints; then what makes them count.
        """
        done = set()

        def put(name: str) -> None:
            path = self.path / name
            try:
                remote.store(self.url).put_file(str(path), remote.below(self.url, name))
                done.add(name)
            except FileNotFoundError:
                if path.exists():  # else it was deleted since
                    raise

        for kind in (0, 1, 2):
            remote.in_parallel(put, [name for name in names if _kind(name) == kind])
        return done

    def _delete(self, names: set[str]) -> None:
        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                remote.store(self.url).rm_file(remote.below(self.url, name))
            del self.same[name]

        for kind in (2, 1, 0):
            remote.in_parallel(remove, [name for name in names if _kind(name) == kind])

    def _note_times(self, pushed: Mapping[str, Stamp]) -> None:
        """Give files that were pushed the store's time, by which a later pull knows them."""
        there = remote.list_files(self.url)
        for name, stamp in pushed.items():
            path = self.path / name
            self.same[name] = stamp  # another one if something was appended meanwhile
            if name in there and there[name][0] == stamp[0] and remote.stamp_of(path) == stamp:
                os.utime(path, ns=(there[name][1] * 1000,) * 2)
                self.same[name] = there[name]

    def _push_when_whole(self, step: int) -> None:
        """Push when the checkpoint is there, unless another one is awaited by then."""
        while self.awaited == step:
            if (
                self.path / "checkpoints" / str(step)
            ).is_dir():  # it has this name once it is whole
                try:
                    self.push()
                except InputError as error:  # the next push tries again, and stops the run
                    logging.warning("%s", error)
                return
            time.sleep(0.1)

    def close(self) -> None:
        """Wait for no more checkpoints."""
        self.awaited = None

    def _is_mirrored(self, name: str) -> bool:
        parts = name.split("/")
        if is_temporary(parts[-1]):
            return False
        if parts[0] == "checkpoints":
            return self._has_checkpoints and _step(name) is not None
        return parts[0] not in _MADE_ANEW and not any(part.startswith(".") for part in parts)


def _step(name: str) -> str | None:
    found = _STEP.match(name)
    return found and found[0]


def _kind(name: str) -> int:
    return 2 if _COMMIT.fullmatch(name) else 1 if _step(name) else 0


def _try_writing(url: str) -> None:
    """Raise InputError where the store cannot be written to, before anything is computed."""
    with remote.told(url):
        remote.store(url).pipe_file(f"{url}/.r0_jax", b"")
        remote.store(url).rm_file(f"{url}/.r0_jax")
        if remote.orbax_reaches(url):
            import google.cloud.storage  # noqa: F401  orbax imports it when it deletes


def _check_machines(url: str) -> None:
    """Raise InputError for several machines that would each mirror a part of a checkpoint."""
    if jax.process_count() > 1 and not remote.orbax_reaches(url):
        name = np.asarray(zlib.crc32(socket.gethostname().encode()), np.uint32)
        if len(np.unique(multihost_utils.process_allgather(name))) > 1:
            raise InputError(
                f"{url}: several machines cannot write one checkpoint to s3://; give "
                "a --workdir in gs:// or on a file system that all of them share"
            )


def _in_turn(do: Callable[[], None], what: str) -> None:
    """Call `do` in process 0 first, then in the others: some may share its folder."""
    if jax.process_index() == 0:
        do()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{what}: process 0")
        if jax.process_index() != 0:
            do()
        multihost_utils.sync_global_devices(f"{what}: all processes")
