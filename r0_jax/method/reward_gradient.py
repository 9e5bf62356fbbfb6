"""The gradients of all rewards with respect to the images, joined into one.

Each reward's gradient is divided by its norm, sample by sample, so that no reward drowns another.
Only the weighted sum goes back through decoder and generator:

    g = sum_i w_i grad_I r_i / (||grad_I r_i|| + delta)

A config can change on the way, in this order: the place, a worse image nearby (sharpness);
smoothing; a cap, above which a reward has no gradient; normalization; projection of conflicts.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
from ml_collections import ConfigDict

from r0_jax.diffusion import rollout
from r0_jax.rewards.reward import Reward, value_and_gradient
from r0_jax.weights.network import Params

NORMALIZATIONS = ("per_sample", "running_std", "none")
CONFLICTS = ("keep", "project")
_SMOOTHING = 300  # tag of the random draws


class RewardGradient(NamedTuple):
    """Hold what the rewards say of each sample.

    Attributes:
      images: the weighted sum of gradients.
      scores, norms: each reward's scores and the norms of its gradient.
      cosines: between the gradients of each two rewards, by "first~second".
    """

    images: Float[Array, "b h w 3"]
    scores: dict[str, Float[Array, " b"]]
    norms: dict[str, Float[Array, " b"]]
    cosines: dict[str, Float[Array, " b"]]


def reward_gradient(
    rewards: Sequence[Reward],
    params: dict[str, Params],
    images: Float[Array, "b h w 3"],
    features: dict[str, Shaped[Array, "b d"]],
    keys: rollout.Keys,
    spreads: dict[str, Float[Array, ""]],
    config: ConfigDict,
) -> RewardGradient:
    """Return the joined gradient of the rewards at `images`.

    `images` may lie beyond [0, 1]; rewards see them clipped. The gradient of a pixel beyond the
    range counts only where it leads back: clipping alone would leave the pixel stuck, and ignoring
    the clip would push it on for ever. `spreads` are the standard deviations that "running_std"
    divides by.
    """
    clipped = jnp.clip(images, 0.0, 1.0)
    options, scores, norms, gradients = config.objective, {}, {}, {}
    for reward in rewards:

        def score(images, reward=reward):
            return reward.score(params[reward.name], images, features.get(reward.name))

        entry = config.rewards[reward.name]
        scores[reward.name], gradient = value_and_gradient(score, clipped)
        place, gradient = _descended(score, clipped, gradient, options.sharpness)
        gradient = _smoothed(score, place, gradient, keys, config.regularizers.gradient)
        capped = scores[reward.name] >= entry.cap
        gradient = jnp.where(capped[:, None, None, None], 0.0, gradient)
        norms[reward.name] = norm = _norm(gradient)[:, 0, 0, 0]
        if options.normalization == "per_sample":
            gradient = gradient / (norm + options.delta)[:, None, None, None]
        elif options.normalization == "running_std":
            gradient = gradient / (spreads[reward.name] + options.delta)
        gradients[reward.name] = entry.weight * gradient
    cosines = {
        f"{a}~{b}": _dot(gradients[a], gradients[b])[:, 0, 0, 0]
        / (_norm(gradients[a]) * _norm(gradients[b]) + 1e-12)[:, 0, 0, 0]
        for a, b in itertools.combinations(gradients, 2)
    }
    if options.conflicts == "project":
        gradients = _projected(gradients)
    total = sum(gradients.values(), start=jnp.zeros_like(images))
    leaves = ((images > 1) & (total > 0)) | ((images < 0) & (total < 0))
    return RewardGradient(jnp.where(leaves, 0.0, total), scores, norms, cosines)


def _smoothed(score, images, gradient, keys, options: ConfigDict) -> jax.Array:
    """Apply the `gradient` regularizer: replace a share `weight` of the gradient by an average.

    The average is over `samples` images perturbed by N(0, std^2).
    """
    if options.weight == 0:
        return gradient
    smooth = jnp.zeros_like(gradient)
    for i in range(options.samples):
        noise = options.std * rollout.normal(keys, _SMOOTHING + i, images.shape[1:])
        perturbed = jnp.clip(images + noise, 0.0, 1.0)  # the range that a reward expects
        smooth += value_and_gradient(score, perturbed)[1] / options.samples
    return (1 - options.weight) * gradient + options.weight * smooth


def _descended(score, images, gradient, rho: float) -> tuple[jax.Array, jax.Array]:
    """Return images down the slope, where the reward is lower, and the gradient there.

    A peak that is too narrow to last pulls less. The images change by `rho` in the root mean square
    of their N numbers: grad r(I - rho sqrt(N) grad / ||grad||), so that it means the same at any
    size. Sharpness-aware reward (RSA-FT).
    """
    if rho == 0:
        return images, gradient
    step = rho * math.sqrt(math.prod(images.shape[1:]))
    worse = jnp.clip(images - step * gradient / (_norm(gradient) + 1e-12), 0.0, 1.0)
    return worse, value_and_gradient(score, worse)[1]


def _projected(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return each gradient without the part that works against another one.

    This is PCGrad, sample by sample, with the others in the order of the config.
    """
    found = {}
    for name, gradient in gradients.items():
        for other, against in gradients.items():
            if other != name:
                share = _dot(gradient, against) / (_dot(against, against) + 1e-12)
                gradient -= jnp.minimum(share, 0.0) * against
        found[name] = gradient
    return found


def _dot(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 1"]:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)


def _norm(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 1"]:
    return jnp.sqrt(_dot(x, x))
