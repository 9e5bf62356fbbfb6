"""Makes the result table: models measured on the same prompts and the same noise."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from r0_jax import prompts, rewards
from r0_jax.console import console
from r0_jax.diffusion import grid, schedulers
from r0_jax.errors import InputError
from r0_jax.evaluation import images, statistics, world
from r0_jax.evaluation.batches import batch_size, draw, fill, score
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.files import write_bytes
from r0_jax.models import attention_backend
from r0_jax.parallel import distributed, sharding
from r0_jax.pipelines.pipeline import Pipeline, Tokens, take
from r0_jax.prompts.files import read_prompts
from r0_jax.rewards import tower
from r0_jax.rewards.reward import Reward
from r0_jax.rewards.tower import normalize
from r0_jax.weights import lazy
from r0_jax.weights.network import Params
from r0_jax.workdir.run import Run

SHOWN = 12  # prompts; the report shows their images


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
    asked = read_prompts(test.prompts)[: test.num_prompts]
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
    image_features: Callable[[np.ndarray], np.ndarray] | None

    @classmethod
    def build(cls, config: ConfigDict, pipeline: Pipeline) -> "Testbed":
        """Read the test prompts and load all rewards of the config."""
        check(config.test, config.heldout_rewards)
        if config.test.world == "shapes":
            world.check_shape(pipeline.image_shape)
        source, test = prompts.of(config), config.test
        trained_on, heldout = (
            [rewards.load(name, entry, config.dtype, source.text) for name, entry in found.items()]
            for found in (config.rewards, config.heldout_rewards)
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

    def measure(self, model: Model) -> tuple[dict[str, Any], np.ndarray]:
        """Return {metric: {"value", "ci95"}} and the images of the prompts."""
        test, shape = self.config.test, self.pipeline.latent_shape
        noise, keys = fixed_noise(self.config.seed, len(self.prompts), shape)
        mesh = sharding.global_mesh()
        size = batch_size(self.config, len(self.prompts), mesh)
        drawn, seconds = timed_draw(model, self.tokens, noise, keys, size)

        found: dict[str, Any] = {}
        if test.world == "shapes":
            found |= world.judge_metrics(drawn, self.prompts)
        for reward in self.rewards + self.heldout:
            features = self.features.get(reward.column)
            params = lazy.place(reward.scoring_params, sharding.replicated(mesh))
            scores = score(sharding.spread(reward.score, mesh), params, drawn, features, size)
            del params
            name = f"reward/{reward.name}"
            if reward.name == test.features:
                name = "heldout_clip_score"
            elif reward in self.heldout:
                name = f"reward/heldout: {reward.name}"
            found[name] = statistics.mean_ci(scores)
        if self.image_features is not None:
            found |= self._feature_metrics(model, drawn, size)
        calls = model.sampler.network_calls
        found["network_calls"] = {"value": calls, "ci95": [calls, calls]}
        found["seconds_per_image"] = statistics.mean_ci(seconds)
        return found, drawn

    def _feature_metrics(self, model: Model, drawn: np.ndarray, size: int) -> dict[str, Any]:
        test = self.config.test
        found = {}
        if test.world == "shapes":
            scenes = world.render_prompts(self.prompts, self.config.seed)
            found["frechet_distance"] = statistics.bootstrap_ci(
                statistics.frechet_distance,
                self.image_features(drawn),
                self.image_features(scenes),
                seed=self.config.seed,
            )
        count, each = min(test.diversity_prompts, len(self.prompts)), test.samples_per_prompt
        rows = np.repeat(np.arange(count), each)
        noise, keys = fixed_noise(self.config.seed + 1, len(rows), self.pipeline.latent_shape)
        several = draw(model.sampler, model.params, take(self.tokens, rows), noise, keys, size)
        features = self.image_features(several).reshape(count, each, -1)
        found["diversity"] = statistics.mean_ci(statistics.diversity(features))
        return found


def timed_draw(
    model: Model, tokens: Tokens, noise: np.ndarray, keys: jax.Array, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, and the seconds an image of each batch, without compilation."""
    first = fill(len(noise), size)
    model.sampler(model.params, take(tokens, first), noise[first], keys[first]).block_until_ready()
    drawn, seconds = [], []
    for start in range(0, len(noise), size):
        rows = slice(start, start + size)
        begin = time.perf_counter()
        drawn.append(
            draw(model.sampler, model.params, take(tokens, rows), noise[rows], keys[rows], size)
        )
        seconds.append((time.perf_counter() - begin) / size)
    return np.concatenate(drawn), np.asarray(seconds)


def _image_features(config: ConfigDict) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return images [N, h, w, 3] -> unit-length features of the held-out tower [N, D]."""
    if not config.test.features:
        return None
    entry = config.heldout_rewards[config.test.features]
    found = tower.load(entry.path, config.dtype, text=False)
    mesh = sharding.global_mesh()
    params = lazy.place(found.params, sharding.replicated(mesh))
    encode = sharding.spread(
        lambda params, x, _: normalize(
            found.sight.apply(params, "image_features", found.prepare(x).astype(config.dtype))
        ),
        mesh,
    )
    return lambda x: score(encode, params, x, None, batch_size(config, len(x), mesh))


def evaluate_run(run: Run, step: str = "") -> dict[str, Any]:
    """Measure a finished run: the base with guidance, the base in few steps, and R0.

    All processes do it together; process 0 writes eval.json and samples/eval/.
    """
    config = run.config
    chosen = distributed.of_first(lambda: run.choose_step(step))
    pipeline = prompts.of(config).attach(run.pipeline)
    weights = run.weights(run.params(chosen))
    guided = schedulers.from_folder(pipeline.scheduler_config, config.test.base_steps)
    scheduler = grid.grid(pipeline.scheduler_config, config.sampler.num_steps)
    mesh = sharding.global_mesh()
    pipeline = pipeline.attending(attention_backend.of_config(config, mesh))
    few = ImageSampler(pipeline, scheduler, guidance_scale=1.0, mesh=mesh)
    trained = {**pipeline.params, pipeline.generator_part: weights}
    k = config.sampler.num_steps
    models = {
        f"base_{config.test.base_steps}_guided": Model(
            ImageSampler(pipeline, guided, config.test.guidance_scale, mesh=mesh), pipeline.params
        ),
        f"base_{k}": Model(few, pipeline.params),
        f"r0_{k}": Model(few, trained),
    }
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
    everywhere = sharding.replicated(sharding.global_mesh())
    for name, model in models.items():
        console.print(f"evaluating {name}: {len(testbed.prompts)} prompts", highlight=False)
        placed = model._replace(params=lazy.place(model.params, everywhere, testbed.config.dtype))
        table["models"][name], drawn = testbed.measure(placed)
        del placed  # the devices hold one model at a time
        files[name] = [f"{name}/{i:04d}.png" for i in range(min(SHOWN, len(drawn)))]
        if jax.process_index() == 0:
            for i, file in enumerate(files[name]):
                images.save_png(
                    folder / "samples" / "eval" / file, drawn[i], {"prompt": testbed.prompts[i]}
                )
    if jax.process_index() == 0:
        _write(folder, testbed, table, files)
    return table


def _write(
    folder: Path, testbed: Testbed, table: dict[str, Any], files: dict[str, list[str]]
) -> None:
    lines = [
        json.dumps(
            {
                "index": i,
                "prompt": prompt,
                "files": {name: paths[i] for name, paths in files.items()},
            },
            ensure_ascii=False,
        )
        for i, prompt in enumerate(testbed.prompts[:SHOWN])
    ]
    write_bytes(
        folder / "samples" / "eval" / "prompts.jsonl", ("\n".join(lines) + "\n").encode("utf-8")
    )
    text = json.dumps(finite(table), indent=1, allow_nan=False)
    write_bytes(folder / "eval.json", text.encode("utf-8"))


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, at any depth: JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
