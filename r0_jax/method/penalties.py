"""The penalties of method.md section 4: (context, options) -> scalar, float32.

Each but `weight` is a mean over the batch's samples, so that microbatches average to the large
batch.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.diffusion import noise_schedule
from r0_jax.method.context import Context

# Tags of the random draws, so that no two penalties share their noise.
_FEATURE, _GUIDANCE = 100, 200


def weight(context: Context, options: ConfigDict) -> Float[Array, ""]:
    """Return ||theta - theta_pretrained||^2, a sum over all weights; with LoRA, ||A B||^2."""
    del options
    return context.squared_distance()


def output(context: Context, options: ConfigDict) -> Float[Array, ""]:
    """Return the mean squared distance of the generator's x0 and the base's.

    Both start from the same noisy input.
    """
    del options
    return jnp.mean((context.trajectory.x0 - context.base_x0) ** 2)


def feature(context: Context, options: ConfigDict) -> Float[Array, ""]:
    """Return the squared distance of the base's mid-block features on both re-noised x0.

    It is relative to the size of the features. options.least and options.most bound the noise
    level, from 0 to 1 as shares of the trained timesteps.
    """
    level = (options.least, options.most)
    drawn = context.renoise(context.trajectory.x0, level, _FEATURE)
    reference = context.renoise(context.base_x0, level, _FEATURE)
    features = context.base_features(drawn.latents, drawn.timesteps)
    target = lax.stop_gradient(context.base_features(reference.latents, reference.timesteps))
    distance = jnp.mean((features - target) ** 2, axis=(1, 2, 3))
    return jnp.mean(distance / (jnp.mean(target**2, axis=(1, 2, 3)) + 1e-6))


def guidance(context: Context, options: ConfigDict) -> Float[Array, ""]:
    """Return a penalty that makes classifier-free guidance an implicit reward.

    It noises the output again and evaluates the base with and without the prompt. Then it pulls
    x0 along the difference, at the full resolution of the latents:
    target = x0 + scale (x0_cond - x0_uncond),
    loss = ||x0 - target||^2 / mean |x0 - target|.
    """
    x0 = context.trajectory.x0
    noised = context.renoise(lax.stop_gradient(x0), (options.least, options.most), _GUIDANCE)

    def clean(model_output: jax.Array) -> jax.Array:
        return noise_schedule.x0_and_epsilon(
            context.table.prediction_type, model_output, noised.latents, noised.alpha, noised.sigma
        )[0]

    prompted, empty = map(clean, context.base_pair(noised.latents, noised.timesteps))
    target = lax.stop_gradient(x0 + options.scale * (prompted - empty))
    size = lax.stop_gradient(jnp.mean(jnp.abs(x0 - target), axis=(1, 2, 3)))
    return jnp.mean(jnp.mean((x0 - target) ** 2, axis=(1, 2, 3)) / (size + 1e-6))
