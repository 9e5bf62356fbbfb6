"""A user's own reward: `module:function`, checked before it is trusted with a training run."""

import contextlib
import importlib
import inspect
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from r0_jax import lazy
from r0_jax.errors import InputError
from r0_jax.rewards.reward import Reward


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """A reward from `entry.function`, "module:function".

    The function takes (images in [0, 1] [B, h, w, 3] float32, features) and returns float32 [B];
    it must be differentiable and traceable by jax. If the module also has `function_text_features`
    ((list of prompts) -> float32 [N, D]), features holds its rows for the batch, else it is None.
    """
    del dtype, text  # the function decides
    module_name, _, function_name = entry.function.partition(":")
    if not (module_name and function_name):
        raise InputError(f"rewards.{name}.function = {entry.function!r} should read "
                         "module:function")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as e:  # a user's module may raise anything
        raise InputError(f"rewards.{name}: {entry.function} cannot be imported ({_one_line(e)}); "
                         "is its folder on PYTHONPATH?") from None
    encode = getattr(module, f"{function_name}_text_features", None)
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):  # ValueError: what is written in C has no signature
        raise InputError(f"rewards.{name}: {entry.function} must take (images, features)") from None
    return Reward(
        name, {},
        score=lambda params, images, features: function(images, features),
        text_features=None if encode is None else
        lambda params, prompts: np.asarray(encode(list(prompts)), np.float32))


def check(reward: Reward, image_shape: tuple[int, int, int], trained: bool = True,
          features: np.ndarray | None = None) -> None:
    """Runs a reward once, jitted, and, if it is to be trained on, its gradient, on two random
    images, which also hold exact zeros and ones, as clipped images do.

    `features` are those of two prompts, where they were computed before.
    Raises:
      InputError: it fails, or shape, dtype, finiteness or independence of samples is wrong.
    """
    params = lazy.place(reward.params)
    if reward.text_features is not None and features is None:
        with _blaming(reward, "2 prompts"):
            features = reward.text_features(params, ["a first prompt", "第二个提示"])
        if features.ndim != 2 or len(features) != 2:
            raise InputError(f"reward {reward.name}: text features of 2 prompts have shape "
                             f"{features.shape}; expected (2, D)")
    images = jax.random.normal(jax.random.key(0), (2, *image_shape))
    images = jnp.clip(0.5 + 0.5 * images, 0.0, 1.0)
    with _blaming(reward, f"images of shape {images.shape}"):
        found = jax.eval_shape(reward.score, params, images, features)
    if getattr(found, "shape", None) != (2,) or found.dtype != jnp.float32:
        raise InputError(f"reward {reward.name} returns {found} for 2 images; "
                         "expected float32 of shape (2,)")

    def first(images, params):  # an argument: a tower's weights as constants take long to compile
        value = reward.score(params, images, features)
        return value[0], value

    with _blaming(reward, f"the gradient at images of shape {images.shape}"):
        grads, value = jax.jit(jax.grad(first, has_aux=True))(images, params)
    if not bool(jnp.all(jnp.isfinite(value))):
        raise InputError(f"reward {reward.name} is not finite on random images: {value}")
    if not trained:
        return
    if not bool(jnp.all(jnp.isfinite(grads))):
        raise InputError(f"reward {reward.name} has a gradient that is not finite")
    if not bool(jnp.any(grads[0] != 0)):
        raise InputError(f"reward {reward.name} has a gradient of zero: it cannot be trained on")
    if bool(jnp.any(grads[1] != 0)):
        raise InputError(f"reward {reward.name}: one image's score depends on another image; "
                         "scores must be independent within a batch")


@contextlib.contextmanager
def _blaming(reward: Reward, where: str) -> Iterator[None]:
    """Whatever a user's function raises, as one line."""
    try:
        yield
    except Exception as e:
        raise InputError(f"reward {reward.name} fails on {where}: {_one_line(e)}") from None


def _one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0].removesuffix(": ")
