"""Scores a folder of images under their prompts, or checks a reward of your own.

    python -m r0_jax.score --images=DIR --prompts=FILE \\
        --rewards=hps_v2_1=/path,pickscore=/path --out=scores.jsonl
    python -m r0_jax.score --check=module:function

Images named by numbers (00000.png, ... as `r0_jax.sample` writes them) belong to the prompt of
that number, from 0. Other images belong to the prompts in the order of their names: img_2 comes
before img_10. The contact sheet of `r0_jax.sample` is skipped.
"""

import collections
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich import progress
from rich.console import Console
from rich.table import Table

from r0_jax import cli, remote, rewards
from r0_jax.errors import InputError
from r0_jax.evaluation import images, statistics
from r0_jax.evaluation.batches import fill
from r0_jax.files import check_writable, write_bytes
from r0_jax.prompts import files
from r0_jax.rewards import plugin
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OWN_FIELDS = ("file", "prompt")  # of the JSON objects in --out
_CHECKED_SHAPE = (64, 64, 3)  # of the images that check a user's reward
console = Console(stderr=True)


class Item(NamedTuple):
    """An image to score."""

    path: Path
    prompt: str


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path(
        "images",
        None,
        f"folder of images ({', '.join(_SUFFIXES)}): named by the "
        "number of their prompt, from 0, or as many as there are prompts, in the "
        "order of their names: img_2 before img_10",
    )
    cli.define_path("prompts", None, ".txt, .jsonl, .json, .parquet or a tfds folder")
    cli.define_named_paths(
        "rewards", "type=folder, ..., or name:type=folder; types: " + ", ".join(rewards.TYPES)
    )
    cli.define_path("out", None, "file to write: one JSON object an image")
    flags.DEFINE_string("check", None, "module:function of your own reward, to check")
    flags.DEFINE_integer("batch_size", 16, "images scored at once", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "the networks compute in it")


def load_rewards(given: Sequence[str], dtype: str) -> list[Reward]:
    """Load the rewards of a --rewards flag."""
    loaded = {}
    for item in given:
        label, _, where = item.partition("=")
        name, _, kind = label.rpartition(":")
        name = name or kind
        if not where:
            raise InputError(f"--rewards: {item!r} should read type=folder")
        if kind not in rewards.TYPES:
            raise InputError(f"--rewards: {kind!r} is unknown; known: {', '.join(rewards.TYPES)}")
        if name in _OWN_FIELDS:
            raise InputError(f"--rewards: {name!r} is another field in --out: give another name")
        if name in loaded:
            raise InputError(
                f"--rewards names {name} twice: give each its own name, as name:type=folder"
            )
        reward = rewards.load(kind, where, dtype).renamed(name)
        if kind == "function":
            plugin.check(reward, _CHECKED_SHAPE, trained=False)
        loaded[name] = reward
    return list(loaded.values())


def pair(folder: Path, prompts: Sequence[str]) -> tuple[list[Item], list[str]]:
    """Return images with their prompts, and warnings of missing images.

    Raises InputError where names do not tell which prompt an image belongs to.
    """
    if not folder.is_dir():
        raise InputError(f"--images={folder} is not a folder")
    found = sorted(
        (
            path
            for path in folder.iterdir()
            if path.suffix.lower() in _SUFFIXES
            and path.stem != "contact_sheet"
            and not path.name.startswith(".")
        ),
        key=_natural,
    )
    if not found:
        raise InputError(f"{folder} holds no images ({', '.join(_SUFFIXES)})")
    others = [path for path in found if not re.fullmatch(r"\d+", path.stem)]
    if not others:
        by_number: dict[int, Path] = {}
        for path in found:
            if (other := by_number.setdefault(int(path.stem), path)) != path:
                raise InputError(f"{other.name} and {path.name} have the same number")
        extra = [path.name for number, path in by_number.items() if number >= len(prompts)]
        if extra:
            raise InputError(
                f"{folder / extra[0]} has no prompt: there are {len(prompts)}, counted from 0"
            )
        missing = [f"{i:05d}" for i in range(len(prompts)) if i not in by_number]
        return (
            [Item(by_number[i], prompts[i]) for i in sorted(by_number)],
            [f"image {name} is missing" for name in missing],
        )
    if len(found) != len(prompts):
        but = "" if len(others) == len(found) else f" ({others[0].name} is not)"
        raise InputError(
            f"{folder} holds {len(found)} images, but there are {len(prompts)} "
            f"prompts: name images by the number of their prompt, from 0{but}"
        )
    return [Item(*both) for both in zip(found, prompts, strict=True)], []


def doubt(items: Sequence[Item]) -> str | None:
    """Return a warning that tells which image got which prompt; None if there is no doubt.

    There is doubt about images that are paired in order, from the first whose name does not follow
    the one before: there is a gap between numbers, or a name without a number.
    """
    names = [re.fullmatch(r"(.*?)(\d*)", item.path.stem, re.DOTALL).groups() for item in items]
    if not any(prefix for prefix, _ in names):
        return None  # paired by number
    sizes = collections.Counter(prefix for prefix, number in names if number)
    rows = [prefix if number and sizes[prefix] > 1 else None for prefix, number in names]
    for i in range(1, len(items)):
        gap = rows[i] == rows[i - 1] is not None and int(names[i][1]) != int(names[i - 1][1]) + 1
        if gap or (rows[i] is None) != (rows[i - 1] is None):
            said = ", ".join(f"{item.path.name} with {item.prompt!r}" for item in items[i : i + 3])
            more = ", ... (see --out)" if items[i + 3 :] else ""
            return f"names are not numbered one by one, so images are paired in order: {said}{more}"
    return None


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people count: img_2 before img_10."""
    # Text and numbers alternate, so text is compared with text.
    parts = re.split(r"(\d+)", path.stem)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def batches(
    items: Sequence[Item], size: int, bad: Callable[[int, str], None]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (indices of items, images [b, h, w, 3]) of one shape, with b <= size.

    b is the same for all batches of a shape: the last image fills up the last batch. One batch is
    held at a time, since headers tell which images have the same shape. `bad` gets the index and
    the error of each image that cannot be read.
    """
    groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)

    def trying(read: Callable[[Path], Any], index: int) -> Any:
        try:
            return read(items[index].path)
        except InputError as error:
            bad(index, str(error).rstrip("."))

    for i in range(len(items)):
        if (shape := trying(images.read_shape, i)) is not None:
            groups[shape].append(i)
    for group in groups.values():
        b = min(size, len(group))
        for start in range(0, len(group), b):
            held = {
                i: image
                for i in group[start : start + b]
                if (image := trying(images.load_png, i)) is not None
            }
            # A header may not show an orientation.
            for shape in dict.fromkeys(image.shape for image in held.values()):
                indices = [i for i, image in held.items() if image.shape == shape]
                yield indices, np.stack([held[indices[row]] for row in fill(len(indices), b)])


def score(
    found: Sequence[Reward], items: Sequence[Item], batch_size: int, bad: Callable[[str], None]
) -> dict[int, dict[str, float]]:
    """Return {index of item: {reward: score}} of every image that could be read.

    `bad` gets the errors of the others, in order. Each prompt is encoded once. One program is
    compiled for each reward and image shape.
    """
    prompts = list(dict.fromkeys(item.prompt for item in items))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    params = {r.name: lazy.place(r.params) for r in found}
    features = {r.name: r.text_features and r.text_features(params[r.name], prompts) for r in found}
    scorers = {r.name: jax.jit(r.score) for r in found}
    rows: dict[int, dict[str, float]] = {}
    bar = progress.Progress(console=console, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("scoring", total=len(items))
        unread: dict[int, str] = {}

        def skip(index: int, message: str) -> None:
            bar.advance(task)
            unread[index] = message

        for indices, drawn in batches(items, batch_size, skip):
            texts_of = np.asarray([row_of[items[i].prompt] for i in indices])
            texts_in = texts_of[fill(len(indices), len(drawn))]
            for reward in found:
                texts = features[reward.name]
                texts = None if texts is None else texts[texts_in]
                values = scorers[reward.name](params[reward.name], drawn, texts)
                for i, value in zip(indices, np.asarray(values), strict=False):
                    rows.setdefault(i, {})[reward.name] = float(value)
            bar.advance(task, len(indices))
    for i in sorted(unread):
        bad(unread[i])
    return rows


def summary(
    found: Sequence[Reward], rows: Sequence[dict[str, float]], prompts: Sequence[str]
) -> Table:
    """Return a table: each reward's mean, its 95 % interval and the share of prompts it cut off."""
    table = Table("reward", "mean", "95 % interval", "prompts cut off")
    for reward in found:
        entry = statistics.mean_ci(np.asarray([row[reward.name] for row in rows]))
        low, high = entry["ci95"]
        cut = reward.truncated_share(prompts)
        table.add_row(
            reward.name,
            f"{entry['value']:.4f}",
            f"{low:.4f} to {high:.4f}",
            "" if cut is None else f"{cut:.0%}",
        )
    return table


def check(function: str) -> None:
    """Check a user's reward as a training run does; raise InputError that says what fails.

    It checks shape, dtype, a finite and nonzero gradient, jit, and that one image's score does not
    depend on another image.
    """
    plugin.check(rewards.load("function", function), _CHECKED_SHAPE)


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    if given.check is not None:
        check(given.check)
        print(f"{given.check} can be trained on")
        return
    missing = [
        f"--{name}=..." for name in ("images", "prompts", "rewards", "out") if not given[name].value
    ]
    if missing:
        raise InputError(f"missing {' and '.join(missing)} (see --help), or --check=...")
    out = remote.output(given.out)
    if out.is_dir():
        raise InputError(f"--out={out} is a folder: give a file, such as {out / 'scores.jsonl'}")
    check_writable(out.parent)
    prompts = files.read_prompts(given.prompts, numbered=True)
    items, problems = pair(remote.local(given.images), prompts)
    if said := doubt(items):
        print(f"warning: {said}", file=console.file)
    found = load_rewards(given.rewards, given.dtype)
    rows = score(found, items, given.batch_size, problems.append)
    for problem in problems:
        print(f"warning: {problem}, so it is not scored", file=console.file)
    if not rows:
        raise InputError(f"none of the images in {given.images} can be read")
    lines = [
        json.dumps(
            {
                "file": items[i].path.name,
                "prompt": items[i].prompt,
                **{k: v if np.isfinite(v) else None for k, v in rows[i].items()},
            },
            ensure_ascii=False,
        )
        for i in sorted(rows)
    ]
    write_bytes(out, ("\n".join(lines) + "\n").encode("utf-8"))
    Console().print(summary(found, list(rows.values()), [items[i].prompt for i in sorted(rows)]))
    skipped = f", {len(problems)} skipped" if problems else ""
    print(f"{len(rows)} images scored{skipped}; {out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
