"""Measures the averaged generator during training: all rewards, on fixed prompts and noise."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from r0_jax.evaluation import hacking, images, training_samples
from r0_jax.evaluation.batches import chunks, draw, score
from r0_jax.evaluation.noise import fixed_noise
from r0_jax.evaluation.programs import Programs
from r0_jax.method.generator import Generator
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
        self.generator = generator
        asked, kept = config.eval, folder / training_samples.PROMPTS
        self.prompts, self.tokens, self.features = source.evaluation(
            asked.prompts, asked.num_prompts, pipeline, rewards, kept
        )
        self.latent_shape, self.image_shape = pipeline.latent_shape, pipeline.image_shape
        self.programs = Programs(
            config, pipeline, generator, rewards, frozen, mesh, len(self.prompts)
        )
        self.veto = config.veto.to_dict()
        hacking.check_bounds(self.veto, self.programs.grids)
        self.base_signs: dict[str, float] | None = None  # of hacking; measured when first needed

    def __call__(
        self, params: dict[str, jax.Array], step: int
    ) -> tuple[dict[str, float], UInt8[np.ndarray, "h w 3"]]:
        """Return metrics, and the first images side by side.

        "heldout/<name>" and "eval/<name>" are means over one image of each prompt.
        "hacking/<sign>" is a multiple of the base's, and "hacking/vetoed" the number of those
        outside of config.veto.
        """
        grids = self.programs.grids
        if self.base_signs is None:
            base = self.generator.base_weights(params, self.frozen["base"])
            looks = [self._look(drawn) for _, drawn in self._draw(base)]
            self.base_signs = hacking.signs(np.concatenate(looks), grids)
        looks, scores, shown = [], {reward.name: [] for reward in self.rewards}, []
        for rows, drawn in self._draw(self.generator.weights(params, self.frozen["base"])):
            looks.append(self._look(drawn))
            for reward in self.rewards:
                scores[reward.name].append(self._score(reward, drawn, rows))
            shown.extend(drawn[: self.config.eval.grid - len(shown)])
        signs = hacking.signs(np.concatenate(looks), grids)
        found = hacking.relative(signs, self.base_signs)
        vetoed = hacking.outside(found, self.veto)
        values = {f"hacking/{name}": value for name, value in found.items()}
        values[hacking.VETOED] = float(len(vetoed))
        for name, parts in scores.items():
            kind = "heldout" if name in self.heldout else "eval"
            values[f"{kind}/{name}"] = float(np.mean(np.concatenate(parts)))
        sheet = images.grid(np.stack(shown), training_samples.COLUMNS)
        if jax.process_index() == 0:
            images.save_png(
                self.folder / "samples" / f"step_{step:06d}.png", sheet, {"step": str(step)}
            )
        return values, sheet

    def _draw(self, weights: Params) -> Iterator[tuple[slice, Images]]:
        """Yield the rows of each chunk of the prompts, and their images."""
        parts, size = self.programs.parts(weights), self.programs.batch
        for rows in chunks(len(self.prompts), size, self.image_shape):
            noise, keys = fixed_noise(self.config.seed, rows, self.latent_shape)
            part = slice(rows.start, rows.stop)
            tokens = take(self.tokens, part)
            yield (
                part,
                draw(self.programs.sampler, parts, tokens, noise, keys, size, self.check),
            )

    def _look(self, drawn: Images) -> hacking.Rows:
        return score(self.programs.look, None, drawn, None, self.programs.batch, self.check)

    def _score(self, reward: Reward, drawn: Images, rows: slice) -> Float[np.ndarray, " n"]:
        features = self.features.get(reward.column)
        params = self.frozen["rewards"].get(reward.name)
        if params is None:  # held out: it is on the devices only now
            params = lazy.place(reward.scoring_params, self.programs.where(reward))
        of_rows = None if features is None else features[rows]
        scorer = self.programs.scores[reward.name]
        return score(scorer, params, drawn, of_rows, self.programs.batch, self.check)
