"""Scores a folder of images under their prompts, or checks a reward of your own.

    python -m r0_jax.score --images=DIR --prompts=FILE \\
        --rewards=hps_v2_1=/path,pickscore=/path --out=scores.jsonl
    python -m r0_jax.score --images=DIR/prompts.jsonl --rewards=... --out=scores.jsonl
    python -m r0_jax.score --check=module:function

Images named by numbers (00000.png, ... as `r0_jax.sample` writes them) belong to the prompt of
that number, from 0. Other images belong to the prompts in the order of their names: img_2 comes
before img_10. The contact sheet of `r0_jax.sample` is skipped. A list of images with their prompts,
as `r0_jax.sample` writes it in any layout, needs no --prompts.
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

import json
import os
from collections.abc import Sequence

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from r0_jax import cli, compilation_cache, remote, rewards
from r0_jax.errors import InputError, printable
from r0_jax.evaluation import statistics
from r0_jax.evaluation.pairing import SUFFIXES, Item, doubt, pair, read_listing
from r0_jax.evaluation.scoring import (
    CHECKED_SHAPE,
    batches,
    load_rewards,
    prepared_batches,
    score,
)
from r0_jax.evaluation.unfinished import Unfinished, job_of
from r0_jax.files import check_writable, write_bytes
from r0_jax.prompts import files
from r0_jax.rewards import plugin
from r0_jax.rewards.reward import Reward

__all__ = ["batches", "load_rewards", "pair", "prepared_batches", "score"]  # for programs of users
console = Console(stderr=True)


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path(
        "images",
        None,
        f"folder of images ({', '.join(SUFFIXES)}): named by the "
        "number of their prompt, from 0, or as many as there are prompts, in the "
        "order of their names: img_2 before img_10; or a .jsonl list with prompt and image_path",
    )
    cli.define_path("prompts", None, f"{', '.join(files.SUFFIXES)} or a tfds folder")
    cli.define_named_paths(
        "rewards", "type=folder, ..., or name:type=folder; types: " + ", ".join(rewards.TYPES)
    )
    cli.define_path("out", None, "file to write: one JSON object an image")
    flags.DEFINE_string("check", None, "module:function of your own reward, to check")
    flags.DEFINE_integer("batch_size", 16, "images scored at once", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "the networks compute in it")


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
            f"{low:.4f} to {high:.4f}" if len(rows) > 1 else "–",
            "" if cut is None else f"{cut:.0%}",
        )
    return table


def check(function: str) -> None:
    """Check a user's reward as a training run does; raise InputError that says what fails.

    It checks shape, dtype, a finite and nonzero gradient, jit, and that one image's score does not
    depend on another image.
    """
    plugin.check(rewards.load("function", function), CHECKED_SHAPE)


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    if given.check is not None:
        check(given.check)
        print(f"{given.check} can be trained on")
        return
    is_list = (given.images or "").endswith(".jsonl")
    needed = ("images", *(() if is_list else ("prompts",)), "rewards", "out")
    missing = [f"--{name}=..." for name in needed if not given[name].value]
    if missing:
        raise InputError(f"missing {' and '.join(missing)} (see --help), or --check=...")
    out = remote.output(given.out)
    if out.is_dir():
        raise InputError(f"--out={out} is a folder: give a file, such as {out / 'scores.jsonl'}")
    check_writable(out.parent)
    items, problems = _find(given.images, given.prompts, is_list)
    compilation_cache.keep()
    found = load_rewards(given.rewards, given.dtype)
    unfinished = Unfinished(out, items, job_of(found, given.rewards, given.dtype))
    if known := unfinished.read():
        print(f"continuing an unfinished call: {len(known)} images have scores", file=console.file)
    rows = score(found, items, given.batch_size, problems.append, unfinished.keep, known)
    for problem in problems:
        print(f"warning: {printable(problem)}, so it is not scored", file=console.file)
    if not rows:
        raise InputError(f"none of the images in {given.images} can be read")
    lines = [
        json.dumps(
            {
                "file": _file_of(items[i], given.images, is_list),
                "prompt": items[i].prompt,
                **{k: v if np.isfinite(v) else None for k, v in rows[i].items()},
            },
            ensure_ascii=False,
        )
        for i in sorted(rows)
    ]
    # A name that is not UTF-8 keeps its bytes, as Python's json reads them again.
    write_bytes(out, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    unfinished.remove()
    Console().print(summary(found, list(rows.values()), [items[i].prompt for i in sorted(rows)]))
    skipped = f", {len(problems)} skipped" if problems else ""
    print(f"{len(rows)} images scored{skipped}; {out}")


def _find(where: str, prompts: str | None, is_list: bool) -> tuple[list[Item], list[str]]:
    """Return images with their prompts, and warnings of missing images."""
    if is_list:
        if prompts is not None:
            raise InputError("a list of images has its own prompts: leave out --prompts")
        return read_listing(remote.local(where)), []
    items, problems = pair(remote.local(where), files.read_prompts(prompts, numbered=True))
    if said := doubt(items):
        print(f"warning: {printable(said)}", file=console.file)
    return items, problems


def _file_of(item: Item, where: str, is_list: bool) -> str:
    """Return an image's name; in a list, its path from the folder of the list."""
    if not is_list:
        return item.path.name
    return os.path.relpath(item.path, remote.local(where).parent)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
