"""The images that `r0_jax.sample` writes: a killed call continues, a finished one is listed."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from r0_jax.errors import InputError
from r0_jax.evaluation import images
from r0_jax.evaluation.layouts import Target, columns_of
from r0_jax.files import is_temporary, loads, read_json, write_bytes

RECORD, LISTING, SHEET = "sample.json", "prompts.jsonl", "contact_sheet"
_ON_SHEET = 64  # images at most; viewers do not open a sheet of more
_OWN = (".png", ".jpg", ".webp", ".jsonl")  # suffixes of what a call writes


class Gallery:
    """The files of one job in a folder, of which some may be there.

    Args:
      out: the folder.
      prompts: their texts.
      targets: all files of the job, whoever draws them.
      notes: texts of further files, by their paths in the folder.
      job: JSON of all that decides what the images show. `RECORD` keeps it, and a call of another
        job does not mix its images with these.

    Attributes:
      stale: files of another job, which the first new image replaces.
    """

    def __init__(
        self,
        out: Path,
        prompts: Sequence[str],
        targets: Sequence[Target],
        notes: Mapping[str, str],
        job: Mapping[str, object],
    ):
        self.out, self._prompts, self._targets, self._notes = out, prompts, targets, notes
        paths = "\n".join(target.path for target in targets)
        self._job = loads(json.dumps(job))
        self._job["files"] = hashlib.sha256(paths.encode()).hexdigest()[:16]
        self._is_new, self.stale = False, list[Path]()

    def begin(self, overwrite: bool) -> None:
        """Find out whether the folder is free, or holds images of this job.

        Raises InputError where it holds others and `overwrite` is false. Nothing is removed before
        the first new image is there to be written.
        """
        self._is_new = _recorded(self.out).get("job") != self._job
        if self._is_new:
            self.stale = check_free(self.out, overwrite, [t.path for t in self._targets])

    def left(self, process: int = 0, processes: int = 1) -> list[Target]:
        """Return what is not yet drawn of a process's share; whole prompts are shared."""
        mine = (target for target in self._targets if target.prompt % processes == process)
        if self._is_new:
            return list(mine)
        return [target for target in mine if not (self.out / target.path).is_file()]

    def write(
        self,
        targets: Sequence[Target],
        drawn: Iterator[Float[np.ndarray, "b h w 3"]],
        text: Mapping[str, object],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Write targets, whose images come in batches in their order; call `done` after each.

        `text` goes into the text chunks of PNGs. Raises InputError for an image that is NaN.
        """
        singles = itertools.chain.from_iterable(drawn)
        for target in targets:
            shown = np.stack([*itertools.islice(singles, len(target.samples))])
            prompt = self._prompts[target.prompt]
            if not np.isfinite(shown).all():
                raise InputError(
                    f"the image of {prompt!r} is NaN, so it is not written: try --dtype=float32, "
                    "and check that the pipeline's weights are whole"
                )
            self._prepare()
            told: dict[str, object] = {"prompt": prompt, "index": target.prompt}
            if any(target.samples):
                told["sample"] = ",".join(map(str, target.samples))
            image = images.grid(shown, columns_of(len(shown)), pad=0)
            images.save_image(self.out / target.path, image, told | dict(text))
            done()

    def finish(self) -> bool:
        """Write the listing and the contact sheet if all images are there; return whether."""
        if not all((self.out / target.path).is_file() for target in self._targets):
            return False
        for folder in {(self.out / target.path).parent for target in self._targets}:
            for name in filter(is_temporary, os.listdir(folder)):  # of a killed call
                (folder / name).unlink(missing_ok=True)
        lines = (
            json.dumps(
                {"id": t.id, "prompt": self._prompts[t.prompt], "image_path": t.path},
                ensure_ascii=False,
            )
            for t in self._targets
        )
        write_bytes(self.out / LISTING, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
        shown = self.shown
        images.contact_sheet(
            np.stack([images.load_pixels(self.out / target.path) for target in shown]),
            [self._prompts[target.prompt] for target in shown],
            self.out / f"{SHEET}.png",
        )
        return True

    @property
    def shown(self) -> Sequence[Target]:
        """Return the files that the contact sheet shows: the first ones."""
        return self._targets[: max(1, _ON_SHEET // len(self._targets[0].samples))]

    def _prepare(self) -> None:
        """Make room for the first image, once: remove stale files, write the record and notes."""
        if not self._is_new:
            return
        for path in self.stale:
            path.unlink(missing_ok=True)
        files = [target.path for target in self._targets] + list(self._notes)
        record = {"job": self._job, "files": files}
        write_bytes(self.out / RECORD, json.dumps(record, indent=1).encode("utf-8"))
        for name, text in self._notes.items():
            write_bytes(self.out / name, text.encode("utf-8"))
        self._is_new = False


def check_free(out: Path, overwrite: bool, asked: Sequence[str] = ()) -> list[Path]:
    """Return the files of an earlier call, and of `asked` those that are there.

    Raises InputError for any, unless `overwrite`.
    """
    names = re.compile(rf"\d{{5,}}\.png|{SHEET}\.(png|html)|{re.escape(LISTING)}")
    found = [path for path in sorted(out.glob("*.*")) if names.fullmatch(path.name)]
    recorded = _recorded(out).get("files")
    for name in (*asked, *(recorded if isinstance(recorded, list) else ())):
        path = out / str(name)
        inside = path.resolve().is_relative_to(out.resolve())
        if inside and path.suffix in _OWN and path.is_file():
            found.append(path)
    if found and not overwrite:
        raise InputError(
            f"{out} holds images already ({found[0].relative_to(out)}); choose another --out or "
            "replace them with --overwrite"
        )
    return list(dict.fromkeys(found))


def is_recorded(out: Path) -> bool:
    """Return whether a call of this version has begun in a folder."""
    return (out / RECORD).is_file()


def _recorded(out: Path) -> Mapping[str, object]:
    return read_json(out / RECORD) if is_recorded(out) else {}
