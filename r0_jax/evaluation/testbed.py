"""Makes the result table: models measured on the same prompts and the same noise."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from r0_jax import prompts, rewards
from r0_jax.config import trained_rewards
from r0_jax.console import console
from r0_jax.errors import InputError
from r0_jax.evaluation import images, programs, results, statistics, table_programs, world
from r0_jax.evaluation.batches import batch_size, chunks, draw, fill, score
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.evaluation.results import FEATURES, SHOWN
from r0_jax.parallel import distributed, sharding
from r0_jax.pipelines.pipeline import Pipeline, Tokens, take
from r0_jax.prompts.files import read_prompts
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy
from r0_jax.weights.network import Params
from r0_jax.workdir.run import Run


class Model(NamedTuple):
    """One column of the table."""

    sampler: ImageSampler
    params: dict[str, Params]  # of every part of the pipeline


def check(test: ConfigDict, heldout_rewards: ConfigDict) -> None:
    """Raise InputError for mistakes that would only show when the training is over."""
    if not test.prompts:
        return
    for field, least in (
        ("num_prompts", 2),
        ("diversity_prompts", 1),
        ("samples_per_prompt", 2),
        ("base_steps", 1),
    ):
        if test[field] < least:
            raise InputError(f"test.{field}={test[field]} must be at least {least}")
    asked = read_prompts(test.prompts, count=test.num_prompts)
    if len(asked) < 2:
        raise InputError(f"{test.prompts} has one prompt: a test needs at least 2")
    if test.world == "shapes":
        world.check_prompts(asked, test.prompts)
    elif test.world:
        raise InputError(f"test.world={test.world!r} is unknown; use 'shapes' or ''")
    entry = heldout_rewards.get(test.features)
    if test.features and (entry is None or entry.type != "clip_score"):
        raise InputError(
            f"test.features={test.features!r} is not a held-out reward of type clip_score"
        )


class Measured(NamedTuple):
    """What was found of one model.

    Attributes:
      values: {metric: a value a prompt}; diversity has one for each prompt that it is measured on.
      features: of the images, for the Frechet distance; None where there is no such distance.
      calls: of the network, an image.
      seconds: an image, of each batch, without compilation.
      shown: the first images.
    """

    values: dict[str, np.ndarray]
    features: np.ndarray | None
    calls: int
    seconds: np.ndarray
    shown: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Testbed:
    """Prompts, noise and judges that measure every model."""

    config: ConfigDict
    pipeline: Pipeline
    prompts: list[str]
    rewards: list[Reward]
    heldout: list[Reward]
    tokens: Tokens
    features: dict[str, np.ndarray]  # of the rewards that read prompts
    image_features: Callable[[np.ndarray, int], np.ndarray] | None

    @classmethod
    def build(cls, config: ConfigDict, pipeline: Pipeline) -> "Testbed":
        """Read the test prompts and load all rewards of the config."""
        check(config.test, config.heldout_rewards)
        if config.test.world == "shapes":
            world.check_shape(pipeline.image_shape)
        source, test = prompts.of(config), config.test
        trained_on, heldout = (
            [rewards.load(name, entry, config.dtype, source.text) for name, entry in found.items()]
            for found in (trained_rewards(config), config.heldout_rewards)
        )
        read = source.evaluation(test.prompts, test.num_prompts, pipeline, trained_on + heldout)
        return cls(
            config,
            pipeline,
            read.prompts,
            trained_on,
            heldout,
            read.tokens,
            read.features,
            _image_features(config),
        )

    def measure(self, model: Model) -> Measured:
        """Draw and judge an image of each prompt, and several of some for diversity."""
        mesh, size = sharding.global_mesh(), self.batch_size
        warm_up(model, self.tokens, self.pipeline, size)
        scorers = programs.scorers(self.rewards + self.heldout, mesh)
        parts: dict[str, list[np.ndarray]] = {}
        seconds, shown = [], []
        for rows in chunks(len(self.prompts), size, self.pipeline.image_shape):
            stamps = [time.perf_counter()]
            drawn = self._draw(
                model,
                np.asarray(rows),
                rows,
                self.config.seed,
                size,
                lambda stamps=stamps: stamps.append(time.perf_counter()),
            )
            seconds.extend(np.diff(stamps) / size)
            shown.extend(drawn[: SHOWN - len(shown)])
            for name, values in self._judge(drawn, rows, scorers, size).items():
                parts.setdefault(name, []).append(values)
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        features = joined.pop(FEATURES, None)
        if self.image_features is not None:
            joined["diversity"] = self._diversity(model, size)
        values = {name: found for name, found in joined.items() if len(found)}
        return Measured(
            values, features, model.sampler.network_calls, np.asarray(seconds), np.stack(shown)
        )

    def entries(self, found: Measured) -> dict[str, Any]:
        """Return {metric: {"value", "ci95"}} of one model."""
        entries = {name: statistics.mean_ci(values) for name, values in found.values.items()}
        if self.reference is not None:
            entries["frechet_distance"] = self._bootstrap(
                statistics.frechet_distance, found.features, self.reference.features
            )
            entries["frechet_floor"] = self.reference.floor
        entries["network_calls"] = {"value": found.calls, "ci95": [found.calls, found.calls]}
        entries["seconds_per_image"] = statistics.mean_ci(found.seconds)
        return entries

    def differences(self, found: Measured, other: Measured) -> dict[str, Any]:
        """Return {metric: {"value", "ci95"}} of what `found` has more than `other`, in pairs."""
        entries = {
            name: statistics.paired_ci(values, other.values[name])
            for name, values in found.values.items()
            if len(values) > 1
        }
        if self.reference is not None:
            entries["frechet_distance"] = self._bootstrap(
                frechet_difference, found.features, other.features, self.reference.features
            )
        return entries

    @property
    def batch_size(self) -> int:
        """How many images every program works on at a time."""
        return batch_size(self.config, len(self.prompts), sharding.global_mesh())

    @functools.cached_property
    def reference(self) -> "Reference | None":
        """What the Frechet distance is to: rendered scenes of the same prompts."""
        if self.image_features is None or self.config.test.world != "shapes":
            return None
        features, again = (
            self.image_features(
                world.render_prompts(self.prompts, self.config.seed + i), self.batch_size
            )
            for i in range(2)
        )
        return Reference(features, self._bootstrap(statistics.frechet_distance, again, features))

    def _bootstrap(self, statistic: Callable[..., float], *arrays: np.ndarray) -> dict[str, Any]:
        return statistics.bootstrap_ci(statistic, *arrays, seed=self.config.seed)

    def _draw(
        self,
        model: Model,
        prompts: np.ndarray,
        rows: range,
        seed: int,
        size: int,
        drawn: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Draw the prompts of numbers `prompts` from the noise of images `rows`.

        `drawn` is called after each batch.
        """
        noise, keys = fixed_noise(seed, rows, self.pipeline.latent_shape)
        tokens = take(self.tokens, prompts)
        return draw(model.sampler, model.params, tokens, noise, keys, size, drawn)

    def _judge(
        self, drawn: np.ndarray, rows: range, scorers: dict[str, Callable], size: int
    ) -> dict[str, np.ndarray]:
        """Return {metric: a value an image}; `FEATURES` has the image features."""
        part, found = slice(rows.start, rows.stop), {}
        if self.config.test.world == "shapes":
            found |= world.verdicts(drawn, self.prompts[part])
        everywhere = sharding.replicated(sharding.global_mesh())
        for reward in self.rewards + self.heldout:
            features = self.features.get(reward.column)
            of_rows = None if features is None else features[part]
            params = lazy.place(reward.scoring_params, everywhere)
            name = f"reward/{reward.name}"
            if reward.name == self.config.test.features:
                name = "heldout_clip_score"
            elif reward in self.heldout:
                name = f"reward/heldout: {reward.name}"
            found[name] = score(scorers[reward.name], params, drawn, of_rows, size)
            del params
        if self.image_features is not None and self.reference is not None:
            found[FEATURES] = self.image_features(drawn, size)
        return found

    def _diversity(self, model: Model, size: int) -> np.ndarray:
        """Return the mean distance of several images of a prompt, for each diversity prompt."""
        test = self.config.test
        count, each = min(test.diversity_prompts, len(self.prompts)), test.samples_per_prompt
        prompts, features = np.repeat(np.arange(count), each), []
        for rows in chunks(len(prompts), size, self.pipeline.image_shape):
            part = prompts[rows.start : rows.stop]
            drawn = self._draw(model, part, rows, self.config.seed + 1, size)
            features.append(self.image_features(drawn, size))
        return statistics.diversity(np.concatenate(features).reshape(count, each, -1))


class Reference(NamedTuple):
    """Rendered scenes: their features, and the distance of a second set of them."""

    features: np.ndarray
    floor: dict[str, Any]


def frechet_difference(ours: np.ndarray, theirs: np.ndarray, reference: np.ndarray) -> float:
    """Return how much farther `ours` is from the reference than `theirs`."""
    return statistics.frechet_distance(ours, reference) - statistics.frechet_distance(
        theirs, reference
    )


def warm_up(model: Model, tokens: Tokens, pipeline: Pipeline, size: int) -> None:
    """Compile a model's sampler for batches of `size`."""
    first = fill(len(next(iter(tokens.values()))), size)
    noise, keys = fixed_noise(0, size, pipeline.latent_shape)
    model.sampler(model.params, take(tokens, first), noise, keys).block_until_ready()


def _image_features(config: ConfigDict) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Return (images [N, h, w, 3], size) -> unit-length features of the held-out tower [N, D].

    All parts have `size` images, so that one program is compiled.
    """
    found = table_programs.feature_tower(config)
    if found is None:
        return None
    mesh = sharding.global_mesh()
    params = lazy.place(found.params, sharding.replicated(mesh))
    encode = table_programs.image_features(found, config.dtype, mesh)
    return lambda x, size: score(encode, params, x, None, size)


def evaluate_run(run: Run, step: str = "") -> dict[str, Any]:
    """Measure a finished run: the base with guidance, the base in few steps, and R0.

    With `config.test.base` false it is R0 alone.

    All processes do it together; process 0 writes eval.json and samples/eval/.
    """
    config = run.config
    chosen = distributed.of_first(lambda: run.choose_step(step))
    pipeline = prompts.of(config).attach(run.pipeline)
    weights = run.weights(run.params(chosen), config.dtype)
    guided, few = table_programs.samplers(config, pipeline, sharding.global_mesh())
    trained = {**pipeline.params, pipeline.generator_part: weights}
    k = config.sampler.num_steps
    bases = {
        f"base_{config.test.base_steps}_guided": Model(guided, pipeline.params),
        f"base_{k}": Model(few, pipeline.params),
    }
    models = (bases if config.test.base else {}) | {f"r0_{k}": Model(few, trained)}
    return evaluate_models(
        Testbed.build(config, pipeline), models, run.workdir.path, {"checkpoint": f"step {chosen}"}
    )


def evaluate_models(
    testbed: Testbed, models: dict[str, Model], folder: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Measure models; write and return the contents of `folder`/eval.json."""
    table: dict[str, Any] = {
        "models": {},
        "prompts": len(testbed.prompts),
        "seed": testbed.config.seed,
        **facts,
        "test": testbed.config.test.to_dict(),
    }
    files: dict[str, list[str]] = {}
    measured: dict[str, Measured] = {}
    everywhere = sharding.replicated(sharding.global_mesh())
    for name, model in models.items():
        console.print(f"evaluating {name}: {len(testbed.prompts)} prompts", highlight=False)
        placed = model._replace(params=lazy.place(model.params, everywhere, testbed.config.dtype))
        measured[name] = found = testbed.measure(placed)
        del placed  # the devices hold one model at a time
        table["models"][name] = testbed.entries(found)
        files[name] = [f"{name}/{i:04d}.png" for i in range(len(found.shown))]
        if jax.process_index() == 0:
            for i, file in enumerate(files[name]):
                images.save_png(
                    folder / results.IMAGES / file,
                    found.shown[i],
                    {"prompt": testbed.prompts[i]},
                )
    # The first model is the one to reach; all share prompts and noise, so pairs tell most.
    first, *others = measured
    table["differences"] = {
        name: testbed.differences(measured[name], measured[first]) for name in others
    }
    if jax.process_index() == 0:
        results.write(folder, table, _values(testbed, measured), testbed.prompts, files)
    return table


def _values(testbed: Testbed, measured: dict[str, Measured]) -> dict[str, np.ndarray]:
    """Return "MODEL/METRIC" arrays, one value a prompt, and the features of images and scenes."""
    arrays = {
        f"{name}/{metric}": values
        for name, found in measured.items()
        for metric, values in found.values.items()
    }
    if testbed.reference is not None:
        arrays |= {f"{name}/{FEATURES}": found.features for name, found in measured.items()}
        arrays[f"reference/{FEATURES}"] = testbed.reference.features
    return arrays
