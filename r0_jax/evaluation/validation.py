"""Measures the averaged generator during training: all rewards, on fixed prompts and noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from r0_jax.diffusion import grid
from r0_jax.evaluation import hacking, images
from r0_jax.evaluation.batches import batch_size, draw, score
from r0_jax.evaluation.image_sampler import ImageSampler
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.method.generator import Generator
from r0_jax.parallel import sharding
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.prompts.source import PromptSource
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy
from r0_jax.weights.network import Params


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
        self.noise, self.keys = fixed_noise(config.seed, len(self.prompts), pipeline.latent_shape)

        scheduler = grid.grid(pipeline.scheduler_config, config.sampler.num_steps)
        self.sampler = ImageSampler(pipeline, scheduler, guidance_scale=1.0, mesh=mesh)
        self.weights = jax.jit(generator.weights)
        self.part = pipeline.generator_part
        self.scores = {r.name: sharding.spread(r.score, mesh) for r in rewards}
        self.batch = batch_size(config, len(self.prompts), mesh)
        self.everywhere = sharding.replicated(mesh)
        self.base_signs: dict[str, float] | None = None  # of hacking; measured when first needed

    def __call__(
        self, params: dict[str, jax.Array], step: int
    ) -> tuple[dict[str, float], UInt8[np.ndarray, "h w 3"]]:
        """Return metrics, and the first images side by side.

        "heldout/<name>" and "eval/<name>" are means over one image of each prompt.
        "hacking/<sign>" is a multiple of the base's.
        """
        if self.base_signs is None:
            self.base_signs = self._signs(self._draw(self.frozen["base"]))
        drawn = self._draw(self.weights(params, self.frozen["base"]))
        found = hacking.relative(self._signs(drawn), self.base_signs)
        values = {f"hacking/{name}": value for name, value in found.items()}
        for reward in self.rewards:
            features = self.features.get(reward.column)
            params = self.frozen["rewards"].get(reward.name)
            if params is None:  # held out: it is on the devices only now
                params = lazy.place(reward.scoring_params, self.everywhere)
            scores = score(
                self.scores[reward.name], params, drawn, features, self.batch, self.check
            )
            del params
            kind = "heldout" if reward.name in self.heldout else "eval"
            values[f"{kind}/{reward.name}"] = float(np.mean(scores))
        sheet = images.grid(drawn[: self.config.eval.grid], columns=4)
        if jax.process_index() == 0:
            images.save_png(
                self.folder / "samples" / f"step_{step:06d}.png", sheet, {"step": str(step)}
            )
        return values, sheet

    def _draw(self, weights: Params) -> np.ndarray:
        parts = {**self.frozen, self.part: weights}
        return draw(self.sampler, parts, self.tokens, self.noise, self.keys, self.batch, self.check)

    def _signs(self, drawn: np.ndarray) -> dict[str, float]:
        return hacking.signs(drawn, [reward.grid for reward in self.rewards if reward.grid])
