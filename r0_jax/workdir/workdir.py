"""The folder of a run as its parts see it, wherever it lies."""

import abc
import dataclasses
from pathlib import Path
from typing import ClassVar, TypeAlias

from etils import epath

AnyPath: TypeAlias = Path | epath.Path


class Workdir(abc.ABC):
    """A run's folder: files of this machine, and checkpoints that may lie in a store.

    `mirror.workdir` opens it: a `LocalWorkdir`, or a mirror of one in an object store.

    Attributes:
      path: the folder on this machine.
      is_mirror: whether each machine has a folder of its own, which mirrors the one in a store.
    """

    path: Path
    is_mirror: ClassVar[bool]

    @property
    @abc.abstractmethod
    def checkpoints(self) -> AnyPath:
        """The folder of the checkpoints, of this machine or, for gs://, of the store."""

    @abc.abstractmethod
    def push(self) -> None:
        """Give the store what has changed; process 0 does it."""

    @abc.abstractmethod
    def share(self) -> None:
        """Give all machines what process 0 has written. All processes call it."""

    @abc.abstractmethod
    def push_checkpoint(self, step: int) -> None:
        """Give the store the checkpoint that is being written, once it is whole. Return at once."""

    @abc.abstractmethod
    def pull_checkpoint(self, step: int) -> None:
        """Bring the arrays of a checkpoint to this machine, where they are read from there."""


@dataclasses.dataclass(frozen=True)
class LocalWorkdir(Workdir):
    """A folder of this machine, or of a file system that all machines share: it needs no copies."""

    path: Path
    is_mirror = False

    @property
    def checkpoints(self) -> Path:
        return self.path.resolve() / "checkpoints"

    def push(self) -> None:
        pass

    def share(self) -> None:
        pass

    def push_checkpoint(self, step: int) -> None:
        pass

    def pull_checkpoint(self, step: int) -> None:
        pass
