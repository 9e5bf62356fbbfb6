"""The grid of an ablation: variants of a recipe x seeds, a run each."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from r0_jax import cli
from r0_jax.config import make_paths_absolute
from r0_jax.errors import InputError


class Cell(NamedTuple):
    """One run of the grid.

    Attributes:
      config: of the run, whole and locked.
    """

    variant: str
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """The folder of the run in that of the ablation, such as rewards_alone/seed_0."""
        return f"{folder(self.variant)}/seed_{self.seed}"


def get_config(
    recipe: str, variants: Mapping[str, Sequence[str]], seeds: Sequence[int], num_prompts: int
) -> ConfigDict:
    """Return the config of an ablation, for the get_config() of a file in configs/ablations.

    Args:
      recipe: what `--config` takes, such as "configs/shapes_r0.py:r0plus".
      variants: {name: overrides of the recipe, "field=value"}. The others are compared with the
        first one.
      seeds: of training and noise.
      num_prompts: how many of the recipe's test.prompts measure a run.
    """
    fields = {"recipe": recipe, "seeds": tuple(seeds), "num_prompts": num_prompts}
    # Pairs, since a ConfigDict would sort its names.
    named = tuple((name, tuple(overrides)) for name, overrides in variants.items())
    return ConfigDict(fields | {"variants": named}).lock()


def cells(config: ConfigDict) -> list[Cell]:
    """Return the runs of an ablation's config, seed by seed, each with all variants.

    So whatever is there when a grid is broken off can be compared. Raises InputError for a config
    of another form, an unknown field, two variants of one folder, and a recipe without test.prompts
    to measure with.
    """
    _check(config)
    recipe = cli.read_config(config.recipe)
    if not recipe.test.prompts:
        raise InputError(f"{config.recipe} has no test.prompts to measure with")
    return [
        Cell(name, seed, _changed(recipe, name, overrides, seed, config.num_prompts, i == 0))
        for seed in config.seeds
        for i, (name, overrides) in enumerate(config.variants)
    ]


def folder(variant: str) -> str:
    """Return a variant's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", variant)


def _check(config: ConfigDict) -> None:
    expected = {"recipe", "seeds", "num_prompts", "variants"}
    if set(config) != expected:
        raise InputError(
            "the config is not that of an ablation: make it with r0_jax.ablation.grid.get_config "
            f"({', '.join(sorted(set(config) ^ expected))} missing or unknown)"
        )
    if not config.variants or not config.seeds:
        raise InputError("an ablation needs at least one variant and one seed")
    if len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds={config.seeds} repeats one")
    if len({folder(name) for name, _ in config.variants}) < len(config.variants):
        raise InputError("two variants would have the same folder: rename one")
    if config.num_prompts < 2:
        raise InputError(f"num_prompts={config.num_prompts} must be at least 2")


def _changed(
    recipe: ConfigDict, name: str, overrides: Sequence[str], seed: int, num_prompts: int, base: bool
) -> ConfigDict:
    changed = recipe.copy_and_resolve_references()
    with changed.unlocked():
        for override in overrides:
            field, equals, text = override.partition("=")
            if not equals:
                raise InputError(f"variants[{name!r}]: {override!r} is not field=value")
            _set(changed, name, field, text)
        changed.seed, changed.test.num_prompts = seed, num_prompts
        changed.test.base = base
        make_paths_absolute(changed)
    return changed.lock()


def _set(config: ConfigDict, name: str, field: str, text: str) -> None:
    try:
        now = config_path.get_value(field, config)
    except (LookupError, AttributeError, TypeError, ValueError):
        raise InputError(f"variants[{name!r}]: the recipe has no field {field!r}") from None
    value = _parsed(text)
    if isinstance(now, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(now):
        raise InputError(f"variants[{name!r}]: {field}={text} must be of type {type(now).__name__}")
    config_path.set_value(field, config, value)


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
