"""The reward: a differentiable judge of images under prompts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from r0_jax.errors import InputError
from r0_jax.rewards.preprocess import Preprocess
from r0_jax.weights import lazy
from r0_jax.weights.network import Params, fingerprint

FEATURES = "features/"  # how the columns of rewards begin in a batch
_MOST_KNOWN = 8192  # prompts in the feature cache: 32 MB at 1024 numbers each


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A differentiable judge of images under prompts; higher is better.

        hps = rewards.load("hps_v2_1", "/path/to/converted")
        scores = hps(images, prompts)                           # [B]
        scores, gradient = hps.value_and_grad(images, prompts)  # [B], [B, h, w, 3]

    Attributes:
      name: its name in the config and in every metric.
      params: frozen weights, often `Lazy`. `text_features` takes them as they are; `score` takes
        them on the devices (`lazy.place`).
      score: (params, images in [0, 1] [B, h, w, 3], features) -> float32 [B]. It needs only
        `scoring_params`. A score must not depend on other images of the batch, since gradients
        are normalized per sample.
      text_features: (params, prompts) -> [N, D], computed once per prompt. They are float32
        features, or int32 token ids if the network reads image and prompt together. None if the
        reward does not read the prompt; features are then None too.
      width: D of the features; None if it is unknown before they are computed, or if the reward
        does not read the prompt.
      features_dtype: dtype of the features.
      text_parts: first parts of the names of params that only `text_features` reads.
      truncated: prompts -> bool [N], True for prompts that are too long and lose their end; None
        if the reward truncates nothing.
      reads: name of the text of a prompt's record that it reads: the prompt itself, or another.
      prepare: what `score` does with images first; None if a function of the user does it,
        or if what it makes has not one shape for all images.
      judge: the rest of `score`: (params, prepared images [B, s, s, 3], features) -> float32 [B].
      grid: patches per side of its vision transformer; 0 without one. A generator that hacks the
        reward may repeat a pattern this many times per side.
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
    reads: str = "prompt"
    prepare: Preprocess | None = None
    judge: Callable[[Params, jax.Array, jax.Array | None], Float[Array, " b"]] | None = None

    def __call__(
        self, images: Float[Array, "b h w 3"] | Float[np.ndarray, "b h w 3"], prompts: Sequence[str]
    ) -> Float[Array, " b"]:
        """Score images in [0, 1], one prompt each; return float32 [B].

        Compile once per shape. Raise InputError unless there is one prompt per image.
        """
        _check_call(images, prompts)
        return self._score(self._placed, jnp.asarray(images), self._features(prompts))

    def value_and_grad(
        self, images: Float[Array, "b h w 3"] | Float[np.ndarray, "b h w 3"], prompts: Sequence[str]
    ) -> tuple[Float[Array, " b"], Float[Array, "b h w 3"]]:
        """Return the scores [B], and the gradient [B, h, w, 3] of each image's own score.

        Compile once per shape. Raise InputError unless there is one prompt per image.
        """
        _check_call(images, prompts)
        return self._value_and_grad(self._placed, jnp.asarray(images), self._features(prompts))

    def truncated_share(self, prompts: Sequence[str]) -> float | None:
        """Return the share of truncated prompts, 0 to 1; None if the reward truncates nothing."""
        return None if self.truncated is None else float(np.mean(self.truncated(list(prompts))))

    @property
    def column(self) -> str:
        """The name of the batch's column that holds its features of the prompts."""
        return f"{FEATURES}{self.name}"

    @property
    def scoring_params(self) -> Params:
        """The params that `score` reads."""
        return {
            name: value
            for name, value in self.params.items()
            if name.split(".")[0] not in self.text_parts
        }

    def fingerprint(self) -> str:
        """Return an identifier of the scoring weights, or "" if there are none.

        It depends neither on their dtype nor on the text tower.
        """
        kept = self.scoring_params
        return fingerprint(kept) if kept else ""

    def renamed(self, name: str) -> "Reward":
        """Return the same reward under another name."""
        return dataclasses.replace(self, name=name)

    def same_weights(self, other: "Reward") -> bool:
        """Return whether both rewards have equal weights; their names may differ."""
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
        """The latest prompts and their features."""
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
    """Check shapes and dtype of images and prompts; raise InputError if they do not fit."""
    shape, dtype = np.shape(images), getattr(images, "dtype", np.dtype(object))
    if len(shape) != 4 or shape[-1] != 3 or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"images of shape {shape} and dtype {dtype} cannot be scored: give "
            "floating-point numbers [B, h, w, 3] in [0, 1]"
        )
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise InputError(f"{len(images)} images and {given}: give a list of one prompt per image")


def not_loaded(name: str) -> Callable[[Params, Sequence[str]], np.ndarray]:
    """Return the `text_features` of a reward without its text tower: they raise InputError."""

    def text_features(params: Params, prompts: Sequence[str]) -> np.ndarray:
        raise InputError(
            f"reward {name} was loaded without its text tower: it needs "
            "features that were computed before"
        )

    return text_features


def value_and_gradient(
    score: Callable[[jax.Array], jax.Array], images: Float[Array, "b h w 3"]
) -> tuple[Float[Array, " b"], Float[Array, "b h w 3"]]:
    """Return each sample's score [b] and its gradient [b, h, w, 3].

    One backward pass is enough, since samples are independent.
    """
    scores, pullback = jax.vjp(score, images)
    return scores, pullback(jnp.ones_like(scores))[0]
