"""The noise that images are drawn from, fixed by a seed and the number of the image."""

import functools
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from r0_jax import machine
from r0_jax.diffusion import rollout
from r0_jax.errors import InputError
from r0_jax.files import check_not_pointer, check_regular

_NOISE, _STEPS = range(2)  # tags of the random draws of one image
MOST_PROMPTS, MOST_SAMPLES = 2**20, 2**11  # of which every image has a number of its own


def image_number(prompt: int, sample: int = 0) -> int:
    """Return the number of a prompt's image, on which its noise depends.

    Sample 0 has the prompt's own number. So more samples, or more prompts, change no image.
    """
    return prompt + sample * MOST_PROMPTS


@functools.partial(jax.jit, static_argnames="shape")
def draw_noise(
    key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]
) -> tuple[Float[Array, "b h w c"], rollout.Keys]:
    """Return standard normal noise [B, *shape] and one key an image for what its steps draw.

    Both depend on `key` and an image's index alone, not on the batch.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _STEPS)
    return rollout.normal(keys, _NOISE, shape), step_keys


def fixed_noise(
    seed: int, rows: int | range, shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "n h w c"], rollout.Keys]:
    """Return the noise [N, *shape], on the host, and the keys of images `rows`, or of the first."""
    rows = range(rows) if isinstance(rows, int) else rows
    noise, keys = draw_noise(jax.random.key(seed), jnp.asarray(rows), shape)
    return np.asarray(noise), keys


def read_latents(path: str | Path, shape: tuple[int, ...]) -> Float[np.ndarray, "n h w c"]:
    """Read the noise in a .npy file, as float32; raise InputError that says what is expected."""
    expected = f"expected a .npy file of finite numbers of shape {list(shape)}, [N, h, w, c]"
    check_regular(path)
    try:
        with open(path, "rb") as file:
            _check_header(path, file, shape, expected)
            latents = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; {expected}") from None
    except InputError:
        raise
    except Exception as error:  # numpy raises any kind for a broken header or zip file
        if machine.problem(error):
            raise
        check_not_pointer(path)
        raise InputError(f"{path} is not a whole .npy file of numbers; {expected}") from None
    if not isinstance(latents, np.ndarray):
        raise InputError(f"{path} holds several arrays; {expected}")
    if latents.shape != shape:
        raise InputError(f"{path} has shape {list(latents.shape)}; {expected}")
    if not np.issubdtype(latents.dtype, np.floating):
        raise InputError(f"{path} holds {latents.dtype}, not floating-point numbers; {expected}")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
        latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise InputError(f"{path} holds NaN or infinite numbers; {expected}")
    return latents


def _check_header(path: str | Path, file: BinaryIO, shape: tuple[int, ...], expected: str) -> None:
    """Raise InputError where a .npy file says another shape, before so much is allocated."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        found, _, _ = read(file)
    except Exception:  # of any kind in a broken header; np.load finds the same
        found = shape
    file.seek(0)
    if found != shape:
        raise InputError(f"{path} has shape {list(found)}; {expected}")
