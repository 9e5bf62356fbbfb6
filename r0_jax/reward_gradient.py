"""N rewards -> one gradient with respect to the images.

Each reward's own gradient is normalized by its norm, sample by sample, so that no reward drowns
another, and the weighted sum is pulled back once through decoder and generator:

    g = sum_i w_i grad_I r_i / (||grad_I r_i|| + delta)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped
from ml_collections import ConfigDict

from r0_jax import sampler
from r0_jax.network import Params
from r0_jax.rewards.reward import Reward, value_and_gradient

NORMALIZATIONS = ("per_sample", "none")
_SMOOTHING = 300  # tag of the random draws


class RewardGradient(NamedTuple):
    """The weighted sum of gradients, and each reward's scores and gradient norms, all a sample."""

    images: Float[Array, "b h w 3"]
    scores: dict[str, Float[Array, " b"]]
    norms: dict[str, Float[Array, " b"]]


def reward_gradient(
    rewards: Sequence[Reward],
    params: dict[str, Params],
    images: Float[Array, "b h w 3"],
    features: dict[str, Shaped[Array, "b d"]],
    keys: sampler.Keys,
    config: ConfigDict,
) -> RewardGradient:
    """`images` may lie beyond [0, 1]; rewards see them clipped.

    A pixel beyond the range feels a reward only where it is pulled back: clipping alone would
    leave it stuck, and ignoring the clip would push it on for ever.
    """
    clipped = jnp.clip(images, 0.0, 1.0)
    total, scores, norms = jnp.zeros_like(images), {}, {}
    for reward in rewards:
        def score(images, reward=reward):
            return reward.score(params[reward.name], images, features.get(reward.name))

        scores[reward.name], gradient = value_and_gradient(score, clipped)
        gradient = _smoothed(score, clipped, gradient, keys, config.regularizers.gradient)
        norm = jnp.sqrt(jnp.sum(gradient**2, axis=(1, 2, 3)))
        norms[reward.name] = norm
        if config.objective.normalization == "per_sample":
            gradient = gradient / (norm + config.objective.delta)[:, None, None, None]
        total += config.rewards[reward.name].weight * gradient
    if config.regularizers.gradient.weight:
        norm = jnp.sqrt(jnp.sum(total**2, axis=(1, 2, 3), keepdims=True))
        total *= jnp.minimum(1.0, config.regularizers.gradient.clip / (norm + 1e-12))
    leaves = ((images > 1) & (total > 0)) | ((images < 0) & (total < 0))
    return RewardGradient(jnp.where(leaves, 0.0, total), scores, norms)


def _smoothed(score, images, gradient, keys, options: ConfigDict) -> jax.Array:
    """The `gradient` regularizer: a share `weight` of the gradient is replaced by its average
    over `samples` images perturbed by N(0, std^2). (The weighted sum is cut at `clip` later: a
    gradient that is normalized after a cut would not show it.)"""
    if options.weight == 0:
        return gradient
    smooth = jnp.zeros_like(gradient)
    for i in range(options.samples):
        noise = options.std * sampler.normal(keys, _SMOOTHING + i, images.shape[1:])
        perturbed = jnp.clip(images + noise, 0.0, 1.0)  # all that a reward is promised
        smooth += value_and_gradient(score, perturbed)[1] / options.samples
    return (1 - options.weight) * gradient + options.weight * smooth
