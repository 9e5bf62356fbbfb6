"""Measures how often a reward agrees with the judge, on images that a run's generator draws.

    python -m benchmarks.reward_sight --workdir=runs/shapes_r0

The generator draws several images of each validation prompt. The benchmark pairs an accepted with a
rejected image of one prompt, and counts how often a reward prefers the accepted one. Chance is 0.5.
Maximizing a reward cannot correct errors that the reward does not see. Pairs share the prompt,
since scores differ more between prompts than between images.

The last rows show the implicit reward of the guidance regularizer at single noise levels. It says
how much better the frozen base model denoises the image with its prompt than without.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Bool, Float
from rich import box
from rich.console import Console
from rich.table import Table

from r0_jax import cli, rewards
from r0_jax.diffusion import grid, noise_schedule
from r0_jax.errors import InputError
from r0_jax.evaluation import statistics
from r0_jax.evaluation.batches import draw, score
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.parallel import sharding
from r0_jax.pipelines.pipeline import Pipeline, take
from r0_jax.prompts import files, prepared
from r0_jax.shapes.judge import judge
from r0_jax.weights import lazy
from r0_jax.workdir import run
from r0_jax.workdir.workdir import LocalWorkdir

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # of the implicit reward, as shares of time
DRAWS = 3  # draws of its noise per level
_BATCH = 40


def define_flags() -> None:
    cli.define_path("workdir", None, "folder of a run on the embedded world", required=True)
    flags.DEFINE_string("step", "", "checkpoint: its step, best or latest")
    flags.DEFINE_integer("num_prompts", 100, "use the last prompts of eval.prompts", lower_bound=1)
    flags.DEFINE_integer("samples_per_prompt", 8, "images per prompt", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "of the noise")


def preferred(
    scores: Float[np.ndarray, "p s"],
    accepted: Bool[np.ndarray, "p s"],
    rejected: Bool[np.ndarray, "p s"],
    seed: int,
) -> dict:
    """Return the share of pairs in which the accepted image scores higher than the rejected one.

    Add a 95 % interval over prompts. Both images of a pair have the same prompt. Without pairs the
    share is NaN.
    """
    higher = scores[:, :, None] > scores[:, None, :]
    pairs = accepted[:, :, None] & rejected[:, None, :]
    counts = np.stack([(higher & pairs).sum((1, 2)), pairs.sum((1, 2))], axis=1)
    if not pairs.any():
        return {"value": float("nan"), "ci95": [float("nan")] * 2}
    return statistics.bootstrap_ci(
        lambda c: c[:, 0].sum() / max(c[:, 1].sum(), 1), counts, seed=seed
    )


def implicit_reward(
    pipeline: Pipeline, seed: int
) -> Callable[[np.ndarray, list[str], float], Float[np.ndarray, " n"]]:
    """Return a function (images, prompts, level) -> implicit rewards.

    The base model denoises each image from the noise level `level`. The implicit reward says how
    much closer the result is to the image with the prompt than without.
    """
    table = grid.noise_levels(pipeline.scheduler_config)
    params, empty = lazy.place(pipeline.params), pipeline.tokenize([""])
    vae = pipeline.networks["vae"]

    @jax.jit
    def closer(params, images, tokens, index, noise):
        latents = vae.apply(params["vae"], "encode", 2 * images - 1)[0] * vae.config.scaling_factor
        alpha, sigma = jnp.asarray(table.alphas)[index], jnp.asarray(table.sigmas)[index]
        noised = alpha * latents + sigma * noise
        timesteps = jnp.full(len(images), jnp.asarray(table.timesteps, jnp.float32)[index])
        told = pipeline.encode_prompt(params, tokens)

        def error(conditioning):
            output = pipeline.denoise(
                params[pipeline.generator_part], noised, timesteps, conditioning
            )
            x0, _ = noise_schedule.x0_and_epsilon(
                table.prediction_type, output, noised, alpha, sigma
            )
            return jnp.mean((x0 - latents) ** 2, axis=(1, 2, 3))

        return error(pipeline.encode_negative(params, empty, told)) - error(told)

    def measure(images: np.ndarray, prompts: list[str], level: float) -> np.ndarray:
        index = round((1 - level) * len(table.timesteps))
        tokens, found = pipeline.tokenize(prompts), np.zeros(len(images))
        rng = np.random.default_rng(seed)
        for _ in range(DRAWS):
            noise = rng.standard_normal((len(images), *pipeline.latent_shape)).astype(np.float32)
            for start in range(0, len(images), _BATCH):
                rows = slice(start, start + _BATCH)
                found[rows] += (
                    np.asarray(closer(params, images[rows], take(tokens, rows), index, noise[rows]))
                    / DRAWS
                )
        return found

    return measure


def main(argv: list[str]) -> None:
    del argv
    given = flags.FLAGS
    opened = run.open_run(LocalWorkdir(Path(given.workdir)))
    config, pipeline = opened.config, opened.pipeline
    if config.test.world != "shapes":
        raise InputError(f"{given.workdir} is not a run on the embedded world: there is no judge")
    weights = opened.weights(opened.params(opened.choose_step(given.step)), config.dtype)

    distinct = files.read_prompts(config.eval.prompts or config.data.prompts)[-given.num_prompts :]
    shape = (len(distinct), given.samples_per_prompt)
    prompts = [prompt for prompt in distinct for _ in range(given.samples_per_prompt)]
    noise, keys = fixed_noise(given.seed, len(prompts), pipeline.latent_shape)
    mesh = sharding.local_mesh()
    sampler = ImageSampler(
        pipeline, grid.grid(pipeline.scheduler_config, config.sampler.num_steps), 1.0, mesh=mesh
    )
    params = lazy.place(
        {**pipeline.params, pipeline.generator_part: weights}, sharding.replicated(mesh)
    )
    drawn = draw(sampler, params, pipeline.tokenize(prompts), noise, keys, _BATCH)
    verdict = judge(drawn, prompts)
    accepted = verdict.correct.reshape(shape)
    outline = (
        ~verdict.shape & verdict.presence & verdict.colour & verdict.size & verdict.relation
    ).reshape(shape)
    kinds = {"all": ~accepted, "outline only": outline, "other": ~accepted & ~outline}

    pairs = [int((accepted.sum(1) * rejected.sum(1)).sum()) for rejected in kinds.values()]
    table = Table("prefers the accepted image", box=box.MARKDOWN)
    for kind, count in zip(kinds, pairs, strict=True):
        table.add_column(f"{kind} ({count} pairs)", justify="right")

    def add(name: str, scores: np.ndarray) -> None:
        cells = []
        for rejected in kinds.values():
            share = preferred(scores.reshape(shape), accepted, rejected, given.seed)
            half = (share["ci95"][1] - share["ci95"][0]) / 2
            cells.append(f"{share['value']:.3f} ± {half:.3f}")
        table.add_row(name, *cells)

    for name, entry in [*config.rewards.items(), *config.heldout_rewards.items()]:
        reward = rewards.load(name, entry)
        features = prepared.features({reward.reads: prompts}, [reward]).get(reward.column)
        add(name, score(jax.jit(reward.score), lazy.place(reward.params), drawn, features, _BATCH))
    measure = implicit_reward(pipeline, given.seed)
    for level in LEVELS:
        add(f"guidance, level {level}", measure(drawn, prompts, level))
    print(f"{len(prompts)} images of {len(distinct)} prompts, {accepted.mean():.0%} accepted")
    Console(width=110).print(table)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
