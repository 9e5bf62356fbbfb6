"""Compute what pulls at x0 beside the rewards: (context, options) -> directions [B, h, w, c].

All directions have one unit, so that a weight means the same for every network. Let L be a mean
over the N latent elements of a sample. Its direction is

    - sqrt(N) / 2  grad_x0 L

The norm of that depends neither on the resolution, nor on the channels, nor on the VAE. The
rewards' direction has norm 1 (`objective.py`), so a weight is a share of the rewards' pull.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from r0_jax.diffusion import rollout
from r0_jax.method.context import Context

Direction = Float[Array, "b h w c"]

GUIDANCE_FORMS = ("pull", "tdm", "direction")
CONSISTENCY_FORMS = ("huber", "l2")
SCORE_FORMS = ("kl", "sim")
TARGETS = ("generator", "ema")
# Tags of the random draws, so that no two terms share their noise.
_FEATURE, _GUIDANCE, _CONSISTENCY, _SCORE = 100, 200, 300, 400


def output(context: Context, options: ConfigDict) -> Direction:
    """Pull x0 to what the base predicts at the same noisy input: (target - x0) / sqrt(N).

    The target is the base's one-shot x0. With options.guided it is the guided one, at
    options.scale.
    """
    target = context.guided_x0(options.scale) if options.guided else context.base_x0
    return _per_root_of_size(target - context.x0)


def feature(context: Context, options: ConfigDict) -> Direction:
    """Pull the base's mid-block features of x0 to those of the base's own x0.

    Both are noised to one level between options.least and options.most. L is the squared distance
    of the features, relative to their own size.
    """
    level = (options.least, options.most)
    reference = context.renoise(context.base_x0, level, _FEATURE)
    target = context.base_features(reference.latents, reference.timesteps)
    size = jnp.mean(target**2, axis=(1, 2, 3)) + 1e-6

    def distance(x0: Direction) -> Float[Array, " b"]:
        drawn = context.renoise(x0, level, _FEATURE)
        features = context.base_features(drawn.latents, drawn.timesteps)
        return jnp.mean((features - target) ** 2, axis=(1, 2, 3)) / size

    return _descent(distance, context.x0)


def guidance(context: Context, options: ConfigDict) -> Direction:
    """Pull x0 to where classifier-free guidance leads, at the full resolution of the latents.

    The base sees x0 noised to a level between options.least and options.most, with and without the
    prompt: d = x0_prompted - x0_empty, and x0_guided = x0_empty + scale d. By options.form it is

        pull        (x0_guided - x0) / sqrt(N)
        tdm         (scale - 1) d / (sqrt(N) mean |x0 - x0_guided|)       (TDM-R1's loss)
        direction   d / ||d||
    """
    x0 = context.x0
    noised = context.renoise(x0, (options.least, options.most), _GUIDANCE)
    prompted, empty = context.clean_pair(noised)
    along = prompted - empty
    if options.form == "direction":
        return unit(along)
    guided = empty + options.scale * along
    if options.form == "pull":
        return _per_root_of_size(guided - x0)
    size = jnp.mean(jnp.abs(x0 - guided), axis=(1, 2, 3), keepdims=True)
    return _per_root_of_size((options.scale - 1) * along / (size + 1e-6))


def consistency(context: Context, options: ConfigDict) -> Direction:
    """Descend `consistency_loss`."""
    return _descent(consistency_loss(context, options), context.x0)


def consistency_loss(
    context: Context, options: ConfigDict
) -> Callable[[Direction], Float[Array, " b"]]:
    """Return RG-LCM's consistency distillation loss, x0 -> [B], at the generator's noisy input z.

    The base is the teacher. Guided by w ~ U[options.least, options.most] for each sample, it takes
    one step of DDIM from z, which ends options.skip lower. The loss is the distance, by
    options.form, between x0 and what the target network predicts from there:

        x0_guided = x0_empty + (1 + w) (x0_prompted - x0_empty)
        z_s       = alpha_s x0_guided + sigma_s (z - alpha x0_guided) / sigma
        L         = mean(sqrt((x0 - x0_target(z_s))^2 + c^2) - c)      or mean((x0 - ...)^2)

    Where the step ends at the lowest level, z_s itself is the target, as a consistency model is
    the identity there. RG-LCM takes z from real images; here it is from the generator's rollout.
    """
    share = rollout.uniform(context.keys, _CONSISTENCY)[:, None, None, None]
    w = options.least + (options.most - options.least) * share
    noised, is_lowest = context.toward(context.guided_x0(1 + w), options.skip)
    target = jnp.where(is_lowest, noised.latents, context.clean(context.target, noised))

    def distance(x0: Direction) -> Float[Array, " b"]:
        if options.form == "l2":
            return jnp.mean((x0 - target) ** 2, axis=(1, 2, 3))
        root = jnp.sqrt((x0 - target) ** 2 + options.c**2)
        return jnp.mean(root - options.c, axis=(1, 2, 3))

    return distance


def score(context: Context, options: ConfigDict) -> Direction:
    """Pull what is drawn to where the base finds it likelier than the fake score does.

    Both see x0 noised to a level between options.least and options.most; the base is guided at
    options.scale, the fake is not. By options.form:

        kl      (x0_base - x0_fake) / (sqrt(N) mean |x0 - x0_base|)     (Diff-Instruct, DMD2)
        sim     the descent of twice `score_divergence`                 (SiD, Diff-Instruct*)

    Those are two descents of the integral of a divergence over all levels: of Kullback and Leibler,
    and of the squared distance of scores.
    """
    if options.form == "sim":
        return 2 * _descent(lambda x0: score_divergence(context, options, x0), context.x0)
    base, fake = _scores(context, options, context.x0)
    return _per_root_of_size((base - fake) / _distance(context.x0, base))


def score_divergence(context: Context, options: ConfigDict, x0: Direction) -> Float[Array, " b"]:
    """Return mean(y (x0_fake - x0)) / mean |x0 - x0_base| with y = x0_base - x0_fake, by sample.

    Its gradient passes through both predictions, and not through the divisor. It is that of the
    squared distance of scores, if the fake is the true score of what is drawn (SiD with alpha 1).
    """
    base, fake = _scores(context, options, x0)
    size = jax.lax.stop_gradient(_distance(x0, base))
    return jnp.mean((base - fake) * (fake - x0) / size, axis=(1, 2, 3))


def _scores(context: Context, options: ConfigDict, x0: Direction) -> tuple[Direction, Direction]:
    """Return what the base and the fake predict of x0, noised."""
    noised = context.renoise(x0, (options.least, options.most), _SCORE)
    fake = context.clean(context.fake, noised)
    if options.scale == 1:
        return context.clean(context.base, noised), fake
    prompted, empty = context.clean_pair(noised)
    return empty + options.scale * (prompted - empty), fake


def _distance(x0: Direction, other: Direction) -> Float[Array, "b 1 1 1"]:
    size = jnp.mean(jnp.abs(x0 - other), axis=(1, 2, 3), keepdims=True)
    return jnp.maximum(size, 1e-5)


def unit(x: Direction) -> Direction:
    """Scale each sample to norm 1; a sample of zeros stays as it is."""
    return x / (norm(x) + 1e-20)[:, None, None, None]


def norm(x: Direction) -> Float[Array, " b"]:
    """Return the Euclidean norm of each sample."""
    return jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=(1, 2, 3)))


def _descent(loss: Callable[[Direction], Float[Array, " b"]], x0: Direction) -> Direction:
    """Return - sqrt(N) / 2 grad_x0 of a loss of each sample that is a mean over N elements."""
    count = math.prod(x0.shape[1:])
    return -math.sqrt(count) / 2 * jax.grad(lambda x: jnp.sum(loss(x)))(x0)


def _per_root_of_size(x: Direction) -> Direction:
    return x / math.sqrt(math.prod(x.shape[1:]))
