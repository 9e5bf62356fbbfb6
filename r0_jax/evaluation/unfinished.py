"""Scores that a call of `r0_jax.score` has found so far: a killed one continues."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from r0_jax.errors import InputError
from r0_jax.files import check_regular, loads
from r0_jax.rewards.reward import Reward

Rows = Mapping[int, Mapping[str, float]]  # index of an image -> {reward: score}


class Unfinished:
    """The scores of a call that has not ended, in a hidden file beside --out.

    A line each batch, so that a killed call loses one at most; the same call continues.
    """

    def __init__(self, out: Path, items: Sequence[tuple[Path, str]], job: str):
        self.path = out.with_name(f".{out.name}.unfinished")
        self._items, self._job = items, job
        self._file: BinaryIO | None = None

    def read(self) -> dict[int, dict[str, float]]:
        """Return the scores of an earlier call of the same job, of images that are the same."""
        check_regular(self.path)
        index = {self._key(i): i for i in range(len(self._items))}
        rows: dict[int, dict[str, float]] = {}
        try:
            lines = self.path.read_text("utf-8").split("\n")
        except (OSError, ValueError):
            return {}
        for line in lines:
            try:
                job, scores = loads(line)
                for key, values in scores:
                    if job == self._job and (i := index.get(tuple(key))) is not None:
                        rows.setdefault(i, {}).update({n: float(x) for n, x in values.items()})
            except (ValueError, TypeError, AttributeError, OverflowError):
                continue  # half a line, which a kill leaves
        return rows

    def keep(self, rows: Rows) -> None:
        """Append scores."""
        line = [self._job, [[self._key(i), dict(scores)] for i, scores in rows.items()]]
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags_ = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(self.path, flags_, 0o644), "ab", buffering=0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise InputError(
                    f"another process is scoring into {self.path.name}: give another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            self._file.write(b"\n")  # the end of half a line
        self._file.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Stop appending; the scores stay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file: --out holds all of it."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _key(self, index: int) -> tuple[str, int, int, str]:
        path, prompt = self._items[index]
        try:
            found = path.stat()
        except OSError:  # it is told as an image that cannot be read
            return path.name, 0, 0, prompt
        return path.name, found.st_size, found.st_mtime_ns, prompt


def job_of(found: Sequence[Reward], given: Sequence[str], dtype: str) -> str:
    """Return a digest of what decides a score besides the image and its prompt."""
    facts = [dtype, *given, *(reward.fingerprint() for reward in found)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
