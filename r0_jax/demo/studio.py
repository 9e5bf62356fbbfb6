"""Draws and scores one prompt with a model of the page, and keeps the compiled programs."""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from r0_jax.demo.models import Model
from r0_jax.evaluation import image_sampler
from r0_jax.evaluation.noise import draw_noise
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy

_PROGRAMS = 16  # that are kept: one for each model, number of steps, and guided or not


class Drawing(NamedTuple):
    """One image and what it cost.

    Attributes:
      image: in [0, 1].
      seconds: without compiling.
      compiled: whether a program was compiled before.
      network_calls: of the generator.
      scores: by the rewards' names.
    """

    image: Float[np.ndarray, "h w 3"]
    seconds: float
    compiled: bool
    network_calls: int
    scores: dict[str, float]


class Studio:
    """All models and rewards of a page, on the first device. It is used by one thread at a time."""

    def __init__(self, models: Sequence[Model], rewards: Sequence[Reward], dtype: str = "float32"):
        self.models, self.rewards = list(models), list(rewards)
        self._dtype = dtype
        shared: dict[tuple[str, str], Any] = {}
        self._params = [self._placed(model, shared) for model in models]
        self._reward_params = {reward.name: lazy.place(reward.params) for reward in rewards}
        self._score = {reward.name: jax.jit(reward.score) for reward in rewards}
        self._programs: collections.OrderedDict[Any, Callable] = collections.OrderedDict()

    def _placed(self, model: Model, shared: dict[tuple[str, str], Any]) -> dict[str, Any]:
        """Place a model's weights; what models of one folder have in common only once."""
        found = {}
        for part, params in model.params.items():
            is_own = part == model.pipeline.generator_part
            key = (str(id(params)) if is_own else str(model.pipeline.folder), part)
            if key not in shared:
                shared[key] = lazy.place(params, dtype=self._dtype)
            found[part] = shared[key]
        return found

    def draw(
        self, number: int, prompt: str, seed: int, steps: int, guidance_scale: float | int
    ) -> Drawing:
        """Return what model `number` draws of a prompt.

        Models of one size of latents draw the same prompt and seed from the same noise, that of
        image 0 of `r0_jax.sample`. Raises InputError for what a sampler does not support.
        """
        model, guided = self.models[number], guidance_scale > 1
        tokens = model.pipeline.tokenize([prompt])
        noise, keys = draw_noise(
            jax.random.key(seed), jnp.zeros(1, jnp.int32), model.pipeline.latent_shape
        )
        arguments = (self._params[number], tokens, noise, keys, jnp.float32(guidance_scale))
        shapes = tuple((name, ids.shape) for name, ids in sorted(tokens.items()))
        key = (number, steps, guided, shapes)
        if compiled := key not in self._programs:
            draw = image_sampler.program(model.pipeline, model.scheduler(steps), guided)
            self._programs[key] = jax.jit(draw).lower(*arguments).compile()
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        start = time.perf_counter()
        images = jax.block_until_ready(self._programs[key](*arguments))
        seconds = time.perf_counter() - start
        calls = len(model.scheduler(steps).timesteps) * (2 if guided else 1)
        scores = {reward.name: self._scored(reward, images, prompt) for reward in self.rewards}
        return Drawing(np.asarray(images[0]), seconds, compiled, calls, scores)

    def _scored(self, reward: Reward, images: jax.Array, prompt: str) -> float:
        params = self._reward_params[reward.name]
        features = reward.text_features(params, [prompt]) if reward.text_features else None
        return float(self._score[reward.name](params, images, features)[0])
