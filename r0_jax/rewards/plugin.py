"""A user's own reward, given as `module:function`, and the check of a reward before training."""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from r0_jax.errors import InputError
from r0_jax.rewards.reward import Reward
from r0_jax.weights import lazy
from r0_jax.weights.network import Params

_SAME = 1e-2  # share of the largest score: most that the batch's other images may change a score


def load(name: str, entry: ConfigDict, dtype: str, text: bool) -> Reward:
    """Load a reward from `entry.function`, "module:function".

    The function takes (images, features) and returns scores: float32 [B]. Images are float32
    [B, h, w, 3] in [0, 1]. JAX must be able to trace the function, and to differentiate it if it
    is trained on. The module may also define two functions named after it:

        function_text_features(list of prompts) -> float32 [N, D]
            Called once per prompt; `features` then holds the batch's rows. Without it,
            `features` is None.
        function_params() -> {name: array}
            The weights of a network. The function then takes (params, images, features), and the
            weights are on the devices. Arrays in a closure would become constants of the
            compiled step.

    Raise InputError if the function cannot be imported or takes other arguments.
    """
    del dtype, text  # the function decides
    module_name, _, function_name = entry.function.partition(":")
    if not (module_name and function_name):
        raise InputError(
            f"rewards.{name}.function = {entry.function!r} should read module:function"
        )
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as e:  # a user's module may raise anything
        raise InputError(
            f"rewards.{name}: {entry.function} cannot be imported ({_one_line(e)}); "
            "is its folder on PYTHONPATH?"
        ) from None
    encode = getattr(module, f"{function_name}_text_features", None)
    read_params = getattr(module, f"{function_name}_params", None)
    arguments = ("images", "features") if read_params is None else ("params", "images", "features")
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):  # ValueError: a function in C may have no signature
        raise InputError(
            f"rewards.{name}: {entry.function} must take ({', '.join(arguments)})"
        ) from None
    return Reward(
        name,
        {} if read_params is None else _params(name, entry.function, read_params),
        score=function
        if read_params is not None
        else lambda params, images, features: function(images, features),
        text_features=None
        if encode is None
        else lambda params, prompts: np.asarray(encode(list(prompts)), np.float32),
    )


def _params(name: str, function: str, read) -> dict[str, np.ndarray]:
    with _blaming(name, f"{function}_params()"):
        found = read()
        named = isinstance(found, dict) and all(isinstance(key, str) for key in found)
        arrays = {key: np.asarray(value) for key, value in found.items()} if named else {}
    if not arrays or any(value.dtype == object for value in arrays.values()):
        raise InputError(
            f"rewards.{name}: {function}_params() must return "
            f"{{name: array}}, not {type(found).__name__}"
        )
    return arrays


def check(
    reward: Reward,
    image_shape: tuple[int, int, int],
    trained: bool = True,
    features: np.ndarray | None = None,
    place: Callable[[Params], Params] = lazy.place,
) -> None:
    """Check a reward on random images; with `trained`, check its gradient too.

    The images contain exact zeros and ones, as clipped images do. Two of them appear again in a
    second batch, at other positions: their scores must be the same.

    Args:
      features: of two prompts, if they were computed before.
      place: puts its weights on devices.

    Raises:
      InputError: the reward fails, its shape or dtype is wrong, a score or gradient is not
        finite, or a score depends on other images.
    """
    with _blaming(reward.name, "its weights"):
        params = place(reward.params)
    if reward.text_features is not None and features is None:
        with _blaming(reward.name, "2 prompts"):
            features = reward.text_features(params, ["a first prompt", "第二个提示"])
        if features.ndim != 2 or len(features) != 2:
            raise InputError(
                f"reward {reward.name}: text features of 2 prompts have shape "
                f"{features.shape}; expected (2, D)"
            )
    noise = jax.random.normal(jax.random.key(0), (3, *image_shape))
    one, other = 0.5 + 0.5 * noise[:2]
    # Extremes of brightness and contrast: a score that is relative to the batch would change.
    dull, harsh = 0.1 + 0.05 * noise[2], 2.0 + 5.0 * noise[2]
    batches = [
        jnp.clip(jnp.stack(images), 0.0, 1.0)
        for images in ([one, other, dull], [harsh, one, other])
    ]
    rows = [None, None] if features is None else [features[[0, 1, 0]], features[[0, 0, 1]]]

    def of(batch: int, count: int = 3):
        return batches[batch][:count], None if rows[batch] is None else rows[batch][:count]

    for count in (2, 3):  # finds a function that fixes the batch size
        shape = (count, *image_shape)
        with _blaming(reward.name, f"images of shape {shape}"):
            found = jax.eval_shape(reward.score, params, *of(0, count))
        if getattr(found, "shape", None) != (count,) or found.dtype != jnp.float32:
            raise InputError(
                f"reward {reward.name} returns {found} for {count} images; "
                f"expected float32 of shape ({count},)"
            )

    def first(images, features, params):  # params are arguments: constants compile slowly
        value = reward.score(params, images, features)
        return value[0], value

    run = jax.jit(jax.grad(first, has_aux=True) if trained else first)
    with _blaming(reward.name, f"{'the gradient at ' * trained}images of shape {batches[0].shape}"):
        grads, value = run(*of(0), params)
        _, again = run(*of(1), params)
        value, again = np.asarray(value), np.asarray(again)
    if not np.isfinite([value, again]).all():
        raise InputError(f"reward {reward.name} is not finite on random images: {value}")
    if trained and not bool(jnp.all(jnp.isfinite(grads))):
        raise InputError(f"reward {reward.name} has a gradient that is not finite")
    moved = np.abs(again[1:] - value[:2]).max() > _SAME * np.abs(value).max()
    if moved or (trained and bool(jnp.any(grads[1:] != 0))):
        raise InputError(
            f"reward {reward.name}: one image's score depends on another image; "
            "scores must be independent within a batch"
        )
    if trained and not bool(jnp.any(grads[0] != 0)):
        raise InputError(f"reward {reward.name} has a gradient of zero: it cannot be trained on")


@contextlib.contextmanager
def _blaming(name: str, where: str) -> Iterator[None]:
    """Turn any exception of a user's function into a one-line InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"reward {name} fails on {where}: {_one_line(e)}") from None


def _one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0].removesuffix(": ")
