"""What a reward is."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from r0_jax.network import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A differentiable judge of images under prompts; higher is better.

    Attributes:
      name: its name in the config and in every metric.
      params: frozen weights, passed back to `score` and `text_features` as an argument.
      score: (params, images in [0, 1] [B, h, w, 3], features) -> float32 [B]. One image's score
        must not depend on another's: gradients are normalized sample by sample.
      text_features: (params, prompts) -> float32 [N, D], computed once per prompt; None where
        the reward does not read the prompt (features is then None too).
    """

    name: str
    params: Params
    score: Callable[[Params, jax.Array, jax.Array | None], Float[Array, " b"]]
    text_features: Callable[[Params, Sequence[str]], Float[np.ndarray, "n d"]] | None
