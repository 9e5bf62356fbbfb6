"""Scores image files with rewards, one compiled program a reward."""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from rich import progress
from rich.console import Console

from r0_jax import rewards
from r0_jax.errors import InputError
from r0_jax.evaluation import images
from r0_jax.evaluation.batches import fill
from r0_jax.evaluation.pairing import Item
from r0_jax.evaluation.unfinished import Rows
from r0_jax.rewards import plugin
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy

_OWN_FIELDS = ("file", "prompt")  # of the JSON objects in --out
CHECKED_SHAPE = (64, 64, 3)  # of the images that check a user's reward
_HELD = 2**28  # bytes of images in float32 that a batch holds
console = Console(stderr=True)


def load_rewards(given: Sequence[str], dtype: str) -> list[Reward]:
    """Load the rewards of a --rewards flag."""
    loaded = {}
    for item in given:
        name, kind, where = split(item)
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
            plugin.check(reward, CHECKED_SHAPE, trained=False)
        loaded[name] = reward
    return list(loaded.values())


def split(item: str) -> tuple[str, str, str]:
    """Return name, type and folder of an item of a --rewards flag."""
    label, _, where = item.partition("=")
    name, _, kind = label.rpartition(":")
    return name or kind, kind, where


def batches(
    items: Sequence[Item], size: int, bad: Callable[[int, str], None]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (indices of items, images [b, h, w, 3]) of one shape, for functions that take any.

    b <= size is the same for all batches of a shape: the last image fills up the last batch. One
    batch is held at a time, of at most `_HELD` bytes, since headers tell which images have the same
    shape. `bad` gets the index and the error of each image that cannot be read.
    """
    groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for i in range(len(items)):
        if (shape := _trying(images.read_shape, items, i, bad)) is not None:
            groups[shape].append(i)
    for shape, group in groups.items():
        b = max(1, min(size, len(group), _HELD // (4 * math.prod(shape))))
        for start in range(0, len(group), b):
            held = {
                i: image
                for i in group[start : start + b]
                if (image := _trying(images.load_png, items, i, bad)) is not None
            }
            # A header may not show an orientation.
            for shape in dict.fromkeys(image.shape for image in held.values()):
                indices = [i for i, image in held.items() if image.shape == shape]
                yield indices, np.stack([held[indices[row]] for row in fill(len(indices), b)])


def prepared_batches(
    items: Sequence[Item],
    prepares: Sequence[Preprocess],
    size: int,
    bad: Callable[[int, str], None],
) -> Iterator[tuple[list[int], dict[Preprocess, np.ndarray]]]:
    """Yield (indices of items, {prepare: images [size, s, s, 3]}), whatever size images have.

    Each image is brought to the towers' sizes before the next one is read, so that one image is
    held at a time, and one program serves all.
    """
    indices: list[int] = []
    held: dict[Preprocess, list[np.ndarray]] = {prepare: [] for prepare in prepares}

    def whole() -> tuple[list[int], dict[Preprocess, np.ndarray]]:
        rows = fill(len(indices), size)
        return indices, {prepare: np.stack(held[prepare])[rows] for prepare in held}

    for i in range(len(items)):
        if (image := _trying(images.load_pixels, items, i, bad)) is None:
            continue
        indices.append(i)
        for prepare in held:
            held[prepare].append(prepare.on_host(image))
        if len(indices) == size:
            yield whole()
            indices, held = [], {prepare: [] for prepare in held}
    if indices:
        yield whole()


def _trying(
    read: Callable[[Path], Any], items: Sequence[Item], index: int, bad: Callable[[int, str], None]
) -> Any:
    try:
        return read(items[index].path)
    except InputError as error:
        bad(index, str(error).rstrip("."))


def score(
    found: Sequence[Reward],
    items: Sequence[Item],
    batch_size: int,
    bad: Callable[[str], None],
    keep: Callable[[Rows], None] = lambda rows: None,
    known: Rows = MappingProxyType({}),
) -> dict[int, dict[str, float]]:
    """Return {index of item: {reward: score}} of every image that could be read.

    `bad` gets the errors of the others, in order; `keep` gets scores as they come. What is `known`
    is not computed again. Each prompt is encoded once. One program is compiled for each reward;
    for one that takes images as they are, such as a function of the user's, one for each image
    shape.
    """
    rows = {i: dict(scores) for i, scores in known.items()}
    unread: dict[int, str] = {}
    run = _scorer(found, items)
    # Those that prepare images by themselves see each image once, whatever its size.
    kinds = [
        [reward for reward in found if (reward.prepare is None) == is_function]
        for is_function in (False, True)
    ]

    def left(some: Sequence[Reward]) -> list[int]:
        names = {reward.name for reward in some}
        return [i for i in range(len(items)) if not names <= rows.get(i, {}).keys()]

    bar = progress.Progress(console=console, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("scoring", total=sum(len(left(some)) for some in kinds))

        def skip(index: int, message: str) -> None:
            bar.advance(task)
            unread[index] = message

        for some in kinds:
            asked = [i for i in left(some) if i not in unread]
            for indices, drawn in _read(some, items, asked, batch_size, skip):
                new: dict[int, dict[str, float]] = {i: {} for i in indices}
                for reward in some:
                    values = run(reward, indices, drawn[reward.prepare])
                    for i, value in zip(indices, values, strict=False):
                        new[i][reward.name] = float(value)
                for i in indices:
                    rows.setdefault(i, {}).update(new[i])
                keep(new)
                bar.advance(task, len(indices))
    for i in sorted(unread):
        bad(unread[i])
    return {i: rows[i] for i in sorted(rows) if rows[i].keys() >= {r.name for r in found}}


def _scorer(
    found: Sequence[Reward], items: Sequence[Item]
) -> Callable[[Reward, Sequence[int], np.ndarray], np.ndarray]:
    """Return a function (reward, indices of items, images) -> their scores, the last one repeated.

    The weights are on the device, and each prompt is encoded once.
    """
    prompts = list(dict.fromkeys(item.prompt for item in items))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    params = {r.name: lazy.place(r.params) for r in found}
    features = {r.name: r.text_features and r.text_features(params[r.name], prompts) for r in found}
    compiled = {r.name: jax.jit(r.score if r.prepare is None else r.judge) for r in found}

    def run(reward: Reward, indices: Sequence[int], drawn: np.ndarray) -> np.ndarray:
        texts = features[reward.name]
        if texts is not None:
            rows = np.asarray([row_of[items[i].prompt] for i in indices])
            texts = texts[rows[fill(len(indices), len(drawn))]]
        return np.asarray(compiled[reward.name](params[reward.name], drawn, texts))

    return run


def _read(
    some: Sequence[Reward],
    items: Sequence[Item],
    asked: Sequence[int],
    size: int,
    bad: Callable[[int, str], None],
) -> Iterator[tuple[list[int], dict[Preprocess | None, np.ndarray]]]:
    """Yield batches of the items that are asked for, prepared as rewards of one kind need them."""
    if not (some and asked):
        return
    part = [items[i] for i in asked]

    def skip(place: int, message: str) -> None:
        bad(asked[place], message)

    if some[0].prepare is None:
        for places, drawn in batches(part, size, skip):
            yield [asked[place] for place in places], {None: drawn}
        return
    prepares = list(dict.fromkeys(reward.prepare for reward in some))
    for places, prepared in prepared_batches(part, prepares, min(size, len(part)), skip):
        yield [asked[place] for place in places], prepared
