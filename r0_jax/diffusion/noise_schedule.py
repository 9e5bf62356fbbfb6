"""The noise that a network was trained with, and the meaning of its output."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from r0_jax.errors import InputError

Latents = Float[Array, "b *dims"]  # float32, whatever the network computes in


@dataclasses.dataclass(frozen=True, eq=False)
class VariancePreserving:
    """x_t = alpha_t x0 + sigma_t eps with alpha^2 + sigma^2 = 1, from the variances beta_t.

    The fields are those of diffusers.

    Raises:
      InputError: betas are not from 0 to 1, or not one a timestep.
    """

    num_train_timesteps: int
    beta_start: float | int
    beta_end: float | int
    beta_schedule: str  # "linear", "scaled_linear" or "squaredcos_cap_v2"
    trained_betas: list | tuple | None  # in place of the three above
    prediction_type: str  # "epsilon", "v_prediction" or "sample"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        betas, steps = self.trained_betas, self.num_train_timesteps
        if betas is None:
            if self.beta_schedule != "squaredcos_cap_v2":
                _check_betas([self.beta_start, self.beta_end], "beta_start and beta_end")
            return
        if len(betas) != steps:
            raise InputError(
                f"trained_betas has {len(betas)} values, num_train_timesteps is {steps}"
            )
        _check_betas(betas, "trained_betas")

    @functools.cached_property
    def alphas_cumprod(self) -> Float[NDArray[np.float64], " num_train_timesteps"]:
        """Return alpha_t^2 of each timestep, read-only float64 of the float32 values of diffusers.

        With `rescale_betas_zero_snr` the last is 0.
        """
        alphas = np.float32(1) - self._betas()
        # Like torch, accumulate in float64 and round each product once.
        products = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        if self.rescale_betas_zero_snr:
            products = _rescale_zero_terminal_snr(products)
        exact = products.astype(np.float64)
        exact.setflags(write=False)
        return exact

    def _betas(self) -> NDArray[np.float32]:
        """Return [num_train_timesteps] float32: the variances before any rescaling."""
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float32)
        if self.beta_schedule == "squaredcos_cap_v2":
            times = np.arange(steps + 1) / steps
            alpha_bars = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], 0.999).astype(np.float32)
        power = {"linear": 1, "scaled_linear": 2}[self.beta_schedule]
        ends = np.asarray([self.beta_start, self.beta_end]) ** (1 / power)
        # Like torch.linspace, round the ends to float32 first.
        start, end = ends.astype(np.float32).astype(np.float64)
        return np.linspace(start, end, steps).astype(np.float32) ** power


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """x_t = (1 - sigma) x0 + sigma eps at shifted sigmas.

    Attributes:
      shift: of training: t in [0, 1] is at sigma = shift t / (1 + (shift - 1) t).
    """

    num_train_timesteps: int
    shift: float

    prediction_type: ClassVar[str] = "flow_prediction"


NoiseSchedule = VariancePreserving | FlowMatching


def x0_and_epsilon(
    prediction_type: str,
    model_output: Latents,
    latents: Latents,
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
) -> tuple[Latents, Latents]:
    """Return the clean latents and the noise that a network's output stands for.

    Args:
      latents: the network's input, alpha x0 + sigma eps.
      alpha, sigma: anything that broadcasts over the latents.
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


def model_output(
    prediction_type: str,
    x0: Latents,
    epsilon: Latents,
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
) -> Latents:
    """Return the network's output that stands for x0 and epsilon: undo `x0_and_epsilon`."""
    match prediction_type:
        case "epsilon":
            return epsilon
        case "sample":
            return x0
        case "v_prediction":
            return alpha * epsilon - sigma * x0
        case "flow_prediction":
            return epsilon - x0
    raise ValueError(prediction_type)


def x0_gain(
    prediction_type: str, alpha: NDArray[np.float32], sigma: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return |d x0 / d network output| at latents = alpha x0 + sigma eps."""
    match prediction_type:
        case "epsilon":
            return sigma / alpha
        case "sample":
            return np.ones_like(sigma)
        case "v_prediction" | "flow_prediction":
            return sigma
    raise ValueError(prediction_type)


def _check_betas(betas: Sequence[object], name: str) -> None:
    wrong = [b for b in betas if not (isinstance(b, int | float) and 0 <= b <= 1)]  # NaN is wrong
    if wrong:
        raise InputError(f"{name}: variances are numbers from 0 to 1, found {wrong[0]!r}")


def _rescale_zero_terminal_snr(products: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return alphas_cumprod shifted and scaled so that the last is 0.

    This is algorithm 1 of Lin et al. 2305.08891, in float32 and by way of betas: diffusers rounds
    at each step, and later products inherit it.
    """
    roots = np.sqrt(products)
    first, last = roots[0], roots[-1]
    rescaled = ((roots - last) * (first / (first - last))) ** 2
    betas = 1 - np.concatenate([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
