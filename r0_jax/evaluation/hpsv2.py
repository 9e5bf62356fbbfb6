"""HPSv2's benchmark as its own tool reports it: 100 x score, for each style, over blocks of 80."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
from jax.typing import ArrayLike
from jaxtyping import Shaped

from r0_jax.evaluation import statistics
from r0_jax.evaluation.layouts import STYLES, style_of
from r0_jax.prompts.records import Prompt

BLOCK = 80  # prompts; the benchmark has ten blocks of each style
TYPES = ("hps_v2", "hps_v2_1")  # rewards that the benchmark is defined for


class Result(NamedTuple):
    """The score of one style.

    Attributes:
      mean: 100 x the mean over blocks of their means.
      std: of 100 x the blocks' means, as of a whole population; the tool prints it beside the mean.
      entry: 100 x the mean over prompts with its 95 % interval, which the tool does not have.
      prompts: how many there are.
    """

    mean: float
    std: float
    entry: dict
    prompts: int


def styles_of(prompts: Sequence[Prompt]) -> list[str] | None:
    """Return the style of each prompt; None where they are not of the benchmark."""
    found = [style_of(prompt) for prompt in prompts]
    return found if all(style in STYLES for style in found) else None


def by_style(scores: Shaped[ArrayLike, " n"], styles: Sequence[str]) -> dict[str, Result]:
    """Return the result of each style that is there, of one score a prompt, in their order."""
    values = 100 * np.asarray(scores, np.float64)
    found = {}
    for style in STYLES:
        of_style = values[np.asarray([other == style for other in styles], bool)]
        if len(of_style):
            blocks = [block.mean() for block in _blocks(of_style)]
            entry = statistics.mean_ci(of_style)
            found[style] = Result(
                float(np.mean(blocks)), float(np.std(blocks)), entry, len(of_style)
            )
    return found


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """Return values in blocks; the last one may be shorter."""
    return [values[start : start + BLOCK] for start in range(0, len(values), BLOCK)]


def print_table(name: str, rewards: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a model's results as the tool does: style, mean, std over blocks."""
    table = rich.table.Table(title=f"HPSv2 benchmark: {name}", box=rich.box.SIMPLE_HEAD)
    for column in ("", "style", "100 x score", "std over blocks of 80"):
        table.add_column(column)
    for reward, results in rewards.items():
        for style, result in results.items():
            std = f"{result['std_over_blocks_of_80']:.4f}"
            table.add_row(reward, style, f"{result['mean']:.2f}", std)
    rich.console.Console().print(table)
