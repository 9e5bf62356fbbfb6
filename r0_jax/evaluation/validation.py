"""Measures the averaged generator during training: all rewards, on fixed prompts and noise."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from r0_jax.diffusion import grid
from r0_jax.evaluation import hacking, images
from r0_jax.evaluation.batches import batch_size, chunks, draw, score
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.method.generator import Generator
from r0_jax.parallel import sharding
from r0_jax.pipelines.pipeline import Pipeline, take
from r0_jax.prompts.source import PromptSource
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy
from r0_jax.weights.network import Params

Images = Float[np.ndarray, "n h w 3"]


class Validation:
    """Measures parameters at a step and writes samples/step_NNNNNN.png."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        pipeline: Pipeline,
        generator: Generator,
        source: PromptSource,
        rewards: list[Reward],
        frozen: dict[str, Any],
        heldout: set[str],
        mesh: Mesh,
        check: Callable[[], None],
    ):
        """Read prompts and draw noise; `check` runs between batches and may raise to stop."""
        self.config, self.folder, self.frozen = config, folder, frozen
        self.rewards, self.heldout, self.check = rewards, heldout, check
        asked, kept = config.eval, folder / "eval_prompts.json"
        self.prompts, self.tokens, self.features = source.evaluation(
            asked.prompts, asked.num_prompts, pipeline, rewards, kept
        )
        self.latent_shape, self.image_shape = pipeline.latent_shape, pipeline.image_shape
        self.grids = tuple(sorted({reward.grid for reward in rewards if reward.grid}))

        scheduler = grid.grid(
            pipeline.scheduler_config, config.sampler.num_steps, config.sampler.eta
        )
        self.sampler = ImageSampler(pipeline, scheduler, guidance_scale=1.0, mesh=mesh)
        self.weights = jax.jit(generator.weights)
        self.part = pipeline.generator_part
        self.scores = {r.name: sharding.spread(r.score, mesh) for r in rewards}
        self.batch = batch_size(config, len(self.prompts), mesh)
        self.mesh = mesh
        self.base_signs: dict[str, float] | None = None  # of hacking; measured when first needed

    def __call__(
        self, params: dict[str, jax.Array], step: int
    ) -> tuple[dict[str, float], UInt8[np.ndarray, "h w 3"]]:
        """Return metrics, and the first images side by side.

        "heldout/<name>" and "eval/<name>" are means over one image of each prompt.
        "hacking/<sign>" is a multiple of the base's.
        """
        if self.base_signs is None:
            looks = [self._look(drawn) for _, drawn in self._draw(self.frozen["base"])]
            self.base_signs = hacking.signs(np.concatenate(looks), self.grids)
        looks, scores, shown = [], {reward.name: [] for reward in self.rewards}, []
        for rows, drawn in self._draw(self.weights(params, self.frozen["base"])):
            looks.append(self._look(drawn))
            for reward in self.rewards:
                scores[reward.name].append(self._score(reward, drawn, rows))
            shown.extend(drawn[: self.config.eval.grid - len(shown)])
        signs = hacking.signs(np.concatenate(looks), self.grids)
        found = hacking.relative(signs, self.base_signs)
        values = {f"hacking/{name}": value for name, value in found.items()}
        for name, parts in scores.items():
            kind = "heldout" if name in self.heldout else "eval"
            values[f"{kind}/{name}"] = float(np.mean(np.concatenate(parts)))
        sheet = images.grid(np.stack(shown), columns=4)
        if jax.process_index() == 0:
            images.save_png(
                self.folder / "samples" / f"step_{step:06d}.png", sheet, {"step": str(step)}
            )
        return values, sheet

    def _draw(self, weights: Params) -> Iterator[tuple[slice, Images]]:
        """Yield the rows of each chunk of the prompts, and their images."""
        parts = {**self.frozen, self.part: weights}
        for rows in chunks(len(self.prompts), self.batch, self.image_shape):
            noise, keys = fixed_noise(self.config.seed, rows, self.latent_shape)
            part = slice(rows.start, rows.stop)
            tokens = take(self.tokens, part)
            yield part, draw(self.sampler, parts, tokens, noise, keys, self.batch, self.check)

    def _look(self, drawn: Images) -> hacking.Rows:
        look = functools.partial(hacking.look, grids=self.grids)
        return score(lambda _, x, __: look(x), None, drawn, None, self.batch, self.check)

    def _score(self, reward: Reward, drawn: Images, rows: slice) -> Float[np.ndarray, " n"]:
        features = self.features.get(reward.column)
        params = self.frozen["rewards"].get(reward.name)
        if params is None:  # held out: it is on the devices only now
            params = lazy.place(reward.scoring_params, self._sharding(reward.scoring_params))
        of_rows = None if features is None else features[rows]
        return score(self.scores[reward.name], params, drawn, of_rows, self.batch, self.check)

    def _sharding(self, params: Params) -> dict[str, NamedSharding]:
        """Return where the weights of a held-out reward lie, as those of a trained one do."""
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in params.items()}
        return sharding.param_sharding(shapes, self.mesh, self.config.sharding)
