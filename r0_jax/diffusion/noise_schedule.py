"""The noise that a network was trained with, and what its output means: betas and prediction type.

All schedulers of diffusers for variance-preserving networks (x_t = alpha_t x0 + sigma_t eps with
alpha^2 + sigma^2 = 1) say it in the same fields, however they sample; training asks for nothing
else. How to sample is schedulers.py's matter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from r0_jax.errors import InputError

Latents = Float[Array, "b *dims"]  # float32, whatever the network computes in
# Field of scheduler_config.json -> (default of the diffusers class, what we support): the values
# themselves, or a type where any value will do. Files carry fields of other classes too (SD 1.5's
# PNDM file has `clip_sample`); diffusers does not read those and neither do we.
Fields = Mapping[str, tuple[Any, Any]]

NUMBER = int | float
_FIELDS: Fields = {
    "num_train_timesteps": (1000, int),
    "beta_start": (0.0001, NUMBER),
    "beta_end": (0.02, NUMBER),
    "beta_schedule": ("linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": (None, list | tuple | None),
    "prediction_type": ("epsilon", ("epsilon", "v_prediction", "sample")),
}
_RESCALED = _FIELDS | {"rescale_betas_zero_snr": (False, (False, True))}
# Of classes that can sample flow matching too, which is not what this is about.
_NO_FLOW: Fields = {"use_flow_sigmas": (False, (False, None))}
_STABLE_DIFFUSION: Fields = {"beta_start": (0.00085, NUMBER), "beta_end": (0.012, NUMBER)}
_CLASSES: dict[str, Fields] = {
    "DDIMScheduler": _RESCALED,
    "DDPMScheduler": _RESCALED,
    "DEISMultistepScheduler": _FIELDS | _NO_FLOW,
    "DPMSolverMultistepScheduler": _RESCALED | _NO_FLOW,
    "DPMSolverSinglestepScheduler": _FIELDS | _NO_FLOW,
    "EulerAncestralDiscreteScheduler": _RESCALED,
    "EulerDiscreteScheduler": _RESCALED,
    "HeunDiscreteScheduler": _FIELDS | _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _FIELDS | _STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": _FIELDS | _STABLE_DIFFUSION,
    "LCMScheduler": _RESCALED
    | _STABLE_DIFFUSION
    | {"beta_schedule": ("scaled_linear", _FIELDS["beta_schedule"][1])},
    "LMSDiscreteScheduler": _FIELDS,
    "PNDMScheduler": _FIELDS,
    "TCDScheduler": _RESCALED
    | _STABLE_DIFFUSION
    | {"beta_schedule": ("scaled_linear", _FIELDS["beta_schedule"][1])},
    "UniPCMultistepScheduler": _RESCALED | _NO_FLOW,
}
# Where rescaled betas would end at alpha 0, these keep sigma / alpha finite.
_FINITE = (
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type and
    rescale_betas_zero_snr of a scheduler_config.json, with the defaults of its class.

    InputError names the class or the field that is not supported.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise InputError(
            f"scheduler {name!r} has no betas that are known; known: {', '.join(_CLASSES)}"
        )
    fields = read_fields(config, _CLASSES[name])
    if fields["num_train_timesteps"] < 1:
        raise InputError(
            f"{name} with num_train_timesteps={fields['num_train_timesteps']}: at "
            "least 1 is expected"
        )
    fields.pop("use_flow_sigmas", None)
    return {"rescale_betas_zero_snr": False} | fields


def read_fields(config: Mapping[str, Any], supported: Fields) -> dict[str, Any]:
    """These fields of the config, defaults filled in; InputError names one not supported."""
    name = config["_class_name"]
    fields = {field: config.get(field, default) for field, (default, _) in supported.items()}
    for field, value in fields.items():
        values = supported[field][1]
        listed = isinstance(values, tuple)
        if not (value in values if listed else isinstance(value, values)):
            raise InputError(
                f"{name} with {field}={value!r} is not supported; supported:"
                f" {', '.join(map(repr, values)) if listed else values}"
            )
    return fields


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """[num_train_timesteps] float64: alpha_t^2 of training, the float32 values of diffusers.

    With `rescale_betas_zero_snr` the last is 0, or 2^-24 in samplers whose sigmas are ratios.
    """
    fields = read(config)
    alphas = np.float32(1) - _betas(fields)
    # Like torch, accumulate in float64 and round each product once.
    products = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
    if fields["rescale_betas_zero_snr"]:
        products = _rescale_zero_terminal_snr(products)
        if config["_class_name"] in _FINITE:
            products[-1] = 2**-24
    return products.astype(np.float64)


def x0_and_epsilon(
    prediction_type: str,
    model_output: Latents,
    latents: Latents,
    alpha: Float[ArrayLike, "..."],
    sigma: Float[ArrayLike, "..."],
) -> tuple[Latents, Latents]:
    """The clean latents and the noise that an output at latents = alpha x0 + sigma eps stands for.

    `alpha` and `sigma` may be anything that broadcasts over the latents.
    """
    match prediction_type:
        case "epsilon":
            return (latents - sigma * model_output) / alpha, model_output
        case "sample":
            return model_output, (latents - alpha * model_output) / sigma
        case "v_prediction":
            return alpha * latents - sigma * model_output, alpha * model_output + sigma * latents
        case "flow_prediction":
            return latents - sigma * model_output, latents + alpha * model_output
    raise ValueError(prediction_type)


def _betas(fields: dict[str, Any]) -> np.ndarray:
    """[num_train_timesteps] float32: the variances of the training noise, before any rescaling."""
    n, betas = fields["num_train_timesteps"], fields["trained_betas"]
    if betas is not None:
        if len(betas) != n:
            raise InputError(f"trained_betas has {len(betas)} values, num_train_timesteps is {n}")
        _check_betas(betas, "trained_betas")
        return np.asarray(betas, np.float32)
    if fields["beta_schedule"] == "squaredcos_cap_v2":
        times = np.arange(n + 1) / n
        alpha_bars = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], 0.999).astype(np.float32)
    power = {"linear": 1, "scaled_linear": 2}[fields["beta_schedule"]]
    ends = [fields["beta_start"], fields["beta_end"]]
    _check_betas(ends, "beta_start and beta_end")
    ends = np.asarray(ends) ** (1 / power)
    # Like torch.linspace, round the ends to float32 first.
    start, end = ends.astype(np.float32).astype(np.float64)
    return np.linspace(start, end, n).astype(np.float32) ** power


def _check_betas(betas: Sequence[Any], name: str) -> None:
    wrong = [b for b in betas if not (isinstance(b, int | float) and 0 <= b <= 1)]  # NaN is wrong
    if wrong:
        raise InputError(f"{name}: variances are numbers from 0 to 1, found {wrong[0]!r}")


def _rescale_zero_terminal_snr(products: np.ndarray) -> np.ndarray:
    """alphas_cumprod shifted and scaled so that the last is 0 (Lin et al. 2305.08891, algorithm 1).

    All in float32 and by way of betas: diffusers rounds at each step and later products inherit it.
    """
    roots = np.sqrt(products)
    first, last = roots[0], roots[-1]
    rescaled = ((roots - last) * (first / (first - last))) ** 2
    betas = 1 - np.concatenate([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
