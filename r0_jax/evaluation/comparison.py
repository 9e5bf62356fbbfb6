"""Compares models by images of the same prompts, wherever the images come from.

The images lie in files, so a killed comparison continues, and images of other programs stand in the
same table.
"""

import os
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r0_jax.errors import InputError
from r0_jax.evaluation import (
    distances,
    hacking,
    hpsv2,
    image_features,
    results,
    scoring,
    statistics,
)
from r0_jax.evaluation.distances import Resampled
from r0_jax.evaluation.feature_network import CLIP, FeatureNetwork
from r0_jax.evaluation.pairing import Item
from r0_jax.evaluation.unfinished import Unfinished
from r0_jax.prompts.records import Prompt
from r0_jax.rewards.reward import Reward


class Contender(NamedTuple):
    """A model, by its images.

    Attributes:
      items: prompt by prompt, as many of each.
      calls: of the network, an image; None where nobody knows.
      seconds: an image, of batches without compilation; empty where nobody measured.
    """

    name: str
    items: list[Item]
    calls: int | None = None
    seconds: Sequence[float] = ()


class Judges(NamedTuple):
    """What looks at the images of every contender.

    Attributes:
      kinds: {name of a reward: its type}.
      eyes: what sees images. The first tells how different the samples of a prompt are; each tells
        how far images are from the reference.
      job: what decides the rewards' scores, by `unfinished.job_of`.
    """

    rewards: list[Reward]
    kinds: Mapping[str, str]
    eyes: Sequence["Eyes"]
    job: str


class Eyes(NamedTuple):
    """A network, and the features that it sees in the reference [M, D]; None without any."""

    network: FeatureNetwork
    reference: np.ndarray | None = None


class Measured(NamedTuple):
    """What was found of one contender.

    Attributes:
      values: {metric: a value a prompt}, means over its samples.
      signs: of hacking, over all images.
      distances: to the reference.
      floors: what a perfect model would show, as entries of the table.
      images: how many there are.
    """

    values: dict[str, np.ndarray]
    signs: dict[str, float]
    distances: dict[str, Resampled]
    floors: dict[str, Any]
    images: int


def arrange(items: Sequence[Item], prompts: Sequence[str], name: str) -> list[Item]:
    """Return images in the order of prompts, as many of each.

    Raises InputError where a prompt has none, or fewer than another.
    """
    waiting: dict[str, deque[Item]] = defaultdict(deque)
    for item in items:
        waiting[item.prompt].append(item)
    counts = {text: len(found) for text, found in waiting.items()}
    each = {counts.get(text, 0) // prompts.count(text) for text in dict.fromkeys(prompts)}
    if len(each) != 1 or 0 in each:
        text = min(dict.fromkeys(prompts), key=lambda text: counts.get(text, 0))
        raise InputError(
            f"{name} has {counts.get(text, 0)} images of {text!r}, but should have as many of "
            "each prompt: give the prompts that it was drawn from"
        )
    [count] = each
    return [waiting[text].popleft() for text in prompts for _ in range(count)]


def measure(
    contender: Contender, prompts: int, judges: Judges, out: Path, batch_size: int
) -> Measured:
    """Score all images of a contender; an unfinished call's scores are kept below `out`."""
    items, each = contender.items, len(contender.items) // prompts
    values: dict[str, np.ndarray] = {}
    for name, scores in _scores(contender, judges, out, batch_size).items():
        values[f"reward/{name}"] = scores.reshape(prompts, each).mean(axis=1)
    found: dict[str, Resampled] = {}
    floors: dict[str, Any] = {}
    for i, (network, reference) in enumerate(judges.eyes):
        diverse = i == 0 and each > 1
        if not diverse and reference is None:
            continue
        features = image_features.encode(network, items, batch_size)
        if diverse:
            values["diversity"] = statistics.diversity(features.reshape(prompts, each, -1))
        if reference is not None:
            found |= _distances(network, features, reference)
            floors |= _floors(network, len(features), reference)
    grids = tuple(sorted({reward.grid for reward in judges.rewards if reward.grid}))
    looked = _look(items, grids, batch_size)
    for name, column in hacking.of_images(looked).items():
        values[f"sign/{name}"] = column.reshape(prompts, each).mean(axis=1)
    return Measured(values, hacking.signs(looked, grids), found, floors, len(items))


def _distances(
    network: FeatureNetwork, features: np.ndarray, reference: np.ndarray
) -> dict[str, Resampled]:
    """Return {name: distance to the reference}."""
    found = {network.frechet: distances.frechet_resampled(features, reference)}
    if network.kind == CLIP:
        found["cmmd"] = distances.cmmd_resampled(features, reference)
    return found


def _floors(network: FeatureNetwork, count: int, reference: np.ndarray) -> dict[str, Any]:
    """Return what a perfect model of this many images would show."""
    frechet = distances.floor(statistics.frechet_distance, reference, count)
    found = {f"{network.frechet}_floor": frechet}
    if network.kind == CLIP:
        found["cmmd_floor"] = distances.floor(distances.cmmd, reference, count)
    return found


def _scores(
    contender: Contender, judges: Judges, out: Path, batch_size: int
) -> dict[str, np.ndarray]:
    """Return {reward: a score an image}; a killed call continues."""
    if not judges.rewards:
        return {}
    problems: list[str] = []
    kept = Unfinished(out / f"{contender.name}.scores", contender.items, judges.job)
    try:
        rows = scoring.score(
            judges.rewards, contender.items, batch_size, problems.append, kept.keep, kept.read()
        )
    finally:
        kept.close()
    if problems:
        raise InputError(f"{contender.name}: {problems[0]}")
    kept.remove()
    return {
        reward.name: np.asarray([rows[i][reward.name] for i in range(len(contender.items))])
        for reward in judges.rewards
    }


def _look(items: Sequence[Item], grids: tuple[int, ...], batch_size: int) -> np.ndarray:
    """Return what the signs of hacking need of each image, in order."""

    def bad(index: int, message: str) -> None:
        raise InputError(message)

    rows: dict[int, np.ndarray] = {}
    for indices, drawn in scoring.batches(items, batch_size, bad):
        found = np.asarray(hacking.look(drawn, grids))
        rows.update(zip(indices, found, strict=False))  # the last image may fill up a batch
    return np.stack([rows[i] for i in range(len(items))])


def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    judges: Judges,
    out: Path,
    facts: Mapping[str, Any],
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure contenders; write and return the contents of `out`/eval.json.

    Differences are to the first contender, prompt by prompt. Also writes the values, and for the
    report the first prompts with their images.
    """
    styles = hpsv2.styles_of(prompts)
    measured = {
        contender.name: measure(contender, len(prompts), judges, out, batch_size)
        for contender in contenders
    }
    first = measured[contenders[0].name]
    table: dict[str, Any] = {
        "models": {c.name: _entries(c, measured[c.name], judges, styles) for c in contenders},
        "prompts": len(prompts),
        **facts,
        "differences": {c.name: _differences(measured[c.name], first) for c in contenders[1:]},
        "signs_of_hacking_by_those_of_the_first": {
            c.name: hacking.relative(measured[c.name].signs, first.signs) for c in contenders[1:]
        },
    }
    if styles:
        table["hpsv2"] = {c.name: _benchmark(measured[c.name], judges, styles) for c in contenders}
    arrays = {
        f"{name}/{metric}": values
        for name, found in measured.items()
        for metric, values in found.values.items()
    }
    each = {c.name: len(c.items) // len(prompts) for c in contenders}
    files = {
        c.name: [
            os.path.relpath(item.path, out / results.IMAGES)
            for item in c.items[:: each[c.name]][: results.SHOWN]
        ]
        for c in contenders
    }
    results.write(out, table, arrays, [prompt.text for prompt in prompts], files)
    return table


def _entries(
    contender: Contender, found: Measured, judges: Judges, styles: Sequence[str] | None
) -> dict[str, Any]:
    """Return {metric: {"value", "ci95"}} of one contender."""
    entries = {name: statistics.mean_ci(values) for name, values in found.values.items()}
    for reward, by_style in _benchmark(found, judges, styles or ()).items():
        for style, result in by_style.items():
            entries[f"hpsv2/{reward}, {style}"] = {
                "value": result["mean"],
                "ci95": result["ci95"],
            }
    entries |= {name: distance.entry() for name, distance in found.distances.items()}
    entries |= found.floors
    for name, value in found.signs.items():
        entries.setdefault(f"sign/{name}", {"value": value, "ci95": None})
    if contender.calls is not None:
        entries["network_calls"] = {"value": contender.calls, "ci95": None}
    if len(contender.seconds):
        entries["seconds_per_image"] = statistics.mean_ci(np.asarray(contender.seconds))
    return entries


def _differences(found: Measured, first: Measured) -> dict[str, Any]:
    """Return {metric: {"value", "ci95"}} of what `found` has more than `first`, in pairs."""
    entries = {
        name: statistics.paired_ci(values, first.values[name])
        for name, values in found.values.items()
        if name in first.values and len(values) > 1
    }
    if found.images == first.images:  # else they are not drawn again alike
        for name, distance in found.distances.items():
            entries[name] = distance.less(first.distances[name])
    return entries


def _benchmark(found: Measured, judges: Judges, styles: Sequence[str]) -> dict[str, Any]:
    """Return HPSv2's benchmark of each of its rewards: {reward: {style: numbers}}."""
    if not styles:
        return {}
    return {
        name: {
            style: {
                "mean": result.mean,
                "std_over_blocks_of_80": result.std,
                "ci95": result.entry["ci95"],
                "prompts": result.prompts,
            }
            for style, result in hpsv2.by_style(found.values[f"reward/{name}"], styles).items()
        }
        for name, kind in judges.kinds.items()
        if kind in hpsv2.TYPES
    }
