"""What a reward is."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from r0_jax.errors import InputError
from r0_jax.weights import lazy
from r0_jax.weights.network import Params, fingerprint

_MOST_KNOWN = 8192  # prompts whose features are kept: 32 MB at 1024 numbers each


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A differentiable judge of images under prompts; higher is better.

        hps = rewards.load("hps_v2_1", "/path/to/converted")
        scores = hps(images, prompts)                           # [B]
        scores, gradient = hps.value_and_grad(images, prompts)  # [B], [B, h, w, 3]

    Attributes:
      name: its name in the config and in every metric.
      params: frozen weights, passed back as an argument: `Lazy` ones, which `text_features` takes
        as they are and `score` when they are placed (`lazy.place`).
      score: (params, images in [0, 1] [B, h, w, 3], features) -> float32 [B]; of the params
        `scoring_params` will do. One image's score must not depend on another's: gradients are
        normalized sample by sample.
      text_features: (params, prompts) -> [N, D], computed once per prompt: float32 features, or
        int32 token ids where the network reads image and prompt together; None where the reward
        does not read the prompt (features is then None too).
      width: D of the features; None where it is known only once they are computed, and where the
        reward does not read the prompt.
      features_dtype: of the features.
      text_parts: first names of the params that `text_features` alone reads.
      truncated: prompts -> bool [N], which of them are too long and lose their end; None where
        none can.
      grid: patches a side of its vision transformer, 0 where it has none: a generator that hacks
        it may repeat something so many times.
    """

    name: str
    params: Params
    score: Callable[[Params, jax.Array, jax.Array | None], Float[Array, " b"]]
    text_features: Callable[[Params, Sequence[str]], Shaped[np.ndarray, "n d"]] | None
    truncated: Callable[[Sequence[str]], Bool[np.ndarray, " n"]] | None = None
    grid: int = 0
    width: int | None = None
    features_dtype: Any = jnp.float32
    text_parts: tuple[str, ...] = ()

    def __call__(
        self, images: Float[Array, "b h w 3"] | Float[np.ndarray, "b h w 3"], prompts: Sequence[str]
    ) -> Float[Array, " b"]:
        """One float32 score an image in [0, 1]; jitted, compiled once a shape. InputError unless
        there is a prompt an image."""
        _check_call(images, prompts)
        return self._score(self._placed, jnp.asarray(images), self._features(prompts))

    def value_and_grad(
        self, images: Float[Array, "b h w 3"] | Float[np.ndarray, "b h w 3"], prompts: Sequence[str]
    ) -> tuple[Float[Array, " b"], Float[Array, "b h w 3"]]:
        """Scores, and each image's gradient of its own score; jitted, compiled once a shape.
        InputError unless there is a prompt an image."""
        _check_call(images, prompts)
        return self._value_and_grad(self._placed, jnp.asarray(images), self._features(prompts))

    def truncated_share(self, prompts: Sequence[str]) -> float | None:
        """The share of prompts that lose their end, 0 to 1; None where none can."""
        return None if self.truncated is None else float(np.mean(self.truncated(list(prompts))))

    @property
    def scoring_params(self) -> Params:
        """Of `params`, what `score` reads."""
        return {
            name: value
            for name, value in self.params.items()
            if name.split(".")[0] not in self.text_parts
        }

    def fingerprint(self) -> str:
        """By which the weights that score are known again, whatever dtype they are kept in and
        with or without the text tower; "" where there are none."""
        kept = self.scoring_params
        return fingerprint(kept) if kept else ""

    def renamed(self, name: str) -> "Reward":
        """The same reward under another name."""
        return dataclasses.replace(self, name=name)

    def same_weights(self, other: "Reward") -> bool:
        """Whether both judge by the same numbers, whatever they are called."""
        return (
            bool(self.params)
            and self.params.keys() == other.params.keys()
            and all(
                np.array_equal(np.asarray(value), np.asarray(other.params[name]))
                for name, value in self.params.items()
            )
        )

    def _features(self, prompts: Sequence[str]) -> np.ndarray | None:
        if self.text_features is None:
            return None
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            self._known.update(zip(new, self.text_features(self._placed, new), strict=True))
        found = np.stack([self._known[prompt] for prompt in prompts])
        while len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        return found

    @functools.cached_property
    def _known(self) -> dict[str, np.ndarray]:
        """Prompt -> its features, of those that were asked for last."""
        return {}

    @functools.cached_property
    def _placed(self) -> Params:
        return lazy.place(self.params)

    @functools.cached_property
    def _score(self):
        return jax.jit(self.score)

    @functools.cached_property
    def _value_and_grad(self):
        return jax.jit(
            lambda params, images, features: value_and_gradient(
                lambda x: self.score(params, x, features), images
            )
        )


def _check_call(images: Any, prompts: Any) -> None:
    """InputError for what would be scored, but wrongly, or fail in words of JAX."""
    shape, dtype = np.shape(images), getattr(images, "dtype", np.dtype(object))
    if len(shape) != 4 or shape[-1] != 3 or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"images of shape {shape} and dtype {dtype} cannot be scored: give "
            "[B, h, w, 3] of floating-point numbers in [0, 1]"
        )
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise InputError(f"{len(images)} images and {given}: give a list of one prompt an image")


def not_loaded(name: str) -> Callable[[Params, Sequence[str]], np.ndarray]:
    """The `text_features` of a reward that was loaded without its text tower."""

    def text_features(params: Params, prompts: Sequence[str]) -> np.ndarray:
        raise InputError(
            f"reward {name} was loaded without its text tower: it knows prompts by "
            "features that were computed before"
        )

    return text_features


def value_and_gradient(
    score: Callable[[jax.Array], jax.Array], images: Float[Array, "b h w 3"]
) -> tuple[Float[Array, " b"], Float[Array, "b h w 3"]]:
    """Each sample's score and its gradient; samples do not see each other, so one pass does."""
    scores, pullback = jax.vjp(score, images)
    return scores, pullback(jnp.ones_like(scores))[0]
