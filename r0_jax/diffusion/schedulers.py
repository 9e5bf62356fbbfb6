"""The samplers of diffusers folders, as tables and one formula.

Every sampler here visits points x_t = alpha_t x0 + sigma_t eps and goes from one to the next by

    x_next = alpha_next x0 + sqrt(sigma_next^2 - s^2) eps + s n,      n ~ N(0, I)

where the network's output gives x0 and eps. Only DDIM with eta, LCM and stochastic flow matching
have s > 0. DDIM, LCM and PNDM are variance preserving (alpha^2 + sigma^2 = 1), Euler is variance
exploding (alpha = 1), flow matching is straight (alpha = 1 - sigma). So the families differ in
their tables. PNDM also feeds the formula a combination of the last four outputs. Trajectories are
those of diffusers 0.42.
"""

import dataclasses
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

from r0_jax.diffusion.noise_schedule import (
    FlowMatching,
    Latents,
    VariancePreserving,
    x0_and_epsilon,
)
from r0_jax.diffusion.scheduler_config import FLOW_MATCHING, Fields, SchedulerConfig
from r0_jax.errors import InputError

Index = int | Int[Array, ""]  # counts network calls; may be traced
State = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduler:
    """A sampler of a chosen number of steps: tables with one row a network call."""

    timesteps: NDArray  # fed to the network; int32 (DDIM, LCM, PNDM) or float32
    init_noise_sigma: float  # sampling starts at N(0, I) times this
    prediction_type: str
    input_scales: NDArray
    alphas: NDArray
    sigmas: NDArray
    next_alphas: NDArray
    next_sigmas: NDArray
    noise_stds: NDArray | None = None  # s of the formula at eta = 1
    eta: float | int = 0.0  # s is eta noise_stds
    takes_eta: bool = False  # whether a caller may choose it, as in DDIM
    clip_range: float | None = None  # x0 is clipped to +- this
    multistep_weights: NDArray | None = None  # [n, 4], of the last outputs, newest first

    @property
    def needs_noise(self) -> bool:
        """Return whether steps read `noise`."""
        return self.eta != 0

    def with_eta(self, eta: float | int) -> "Scheduler":
        """Return the sampler with this eta, in [0, 1].

        Raises:
          InputError: `eta` differs from that of a sampler that has its own.
        """
        if not self.takes_eta and eta != self.eta:
            raise InputError(
                f"eta={eta:g} needs a DDIMScheduler: this pipeline's sampler has eta {self.eta:g}"
            )
        return dataclasses.replace(self, eta=eta)

    def init_state(self, latents: Latents) -> State:
        """Return the first `state` of `step`: nothing, or PNDM's start and last three outputs."""
        if self.multistep_weights is None:
            return ()
        return latents, jnp.zeros((3, *latents.shape), latents.dtype)

    def scale_model_input(self, latents: Latents, i: Index) -> Latents:
        """Return the latents as the network takes them."""
        return latents * jnp.asarray(self.input_scales)[i]

    def step(
        self,
        model_output: Latents,
        latents: Latents,
        i: Index,
        state: State,
        noise: Latents | None = None,
    ) -> tuple[Latents, State]:
        """Return the next latents and state.

        x_next = alpha_next x0 + sqrt(sigma_next^2 - s^2) eps + s n with s = eta noise_stds.

        Args:
          model_output: the network's on `scale_model_input(latents, i)` at `timesteps[i]`.
          noise: n; None only where `needs_noise` is false.
        """
        if self.multistep_weights is not None:
            model_output, latents, state = self._multistep(model_output, latents, i, state)
        x0, epsilon = self.x0_and_epsilon(model_output, latents, i)
        if self.clip_range is not None:
            x0 = jnp.clip(x0, -self.clip_range, self.clip_range)
        next_alpha = jnp.asarray(self.next_alphas)[i]
        next_sigma = jnp.asarray(self.next_sigmas)[i]

        if not self.needs_noise:
            return next_alpha * x0 + next_sigma * epsilon, state
        if noise is None:
            raise ValueError("a step with eta draws nothing itself: pass `noise`")
        std = self.eta * jnp.asarray(self.noise_stds)[i]
        # Where all noise is fresh the difference is 0; fused rounding may make it negative.
        kept = jnp.sqrt(jnp.maximum(next_sigma**2 - std**2, 0.0))
        return next_alpha * x0 + kept * epsilon + std * noise, state

    def x0_and_epsilon(
        self, model_output: Latents, latents: Latents, i: Index
    ) -> tuple[Latents, Latents]:
        """Return the clean latents and the noise that the network's output stands for."""
        scale = jnp.asarray(self.input_scales)[i]  # the network saw the latents scaled
        alpha, sigma = scale * jnp.asarray(self.alphas)[i], scale * jnp.asarray(self.sigmas)[i]
        return x0_and_epsilon(self.prediction_type, model_output, scale * latents, alpha, sigma)

    def _multistep(
        self, model_output: Latents, latents: Latents, i: Index, state: State
    ) -> tuple[Latents, Latents, State]:
        """Return the output that the formula takes, its latents and the next state.

        This is PLMS (Liu et al. 2022): Adams-Bashforth on the outputs, with the first step made
        twice. Call 1 looks at where call 0 landed, then redoes that step from the start with the
        mean of both outputs. Its own output does not enter the history.
        """
        start, history = state
        outputs = jnp.concatenate([model_output[None], history])  # [4, b, *dims]
        weights = jnp.asarray(self.multistep_weights)[i]
        combined = sum((weights[k] * outputs[k] for k in range(4)), start=jnp.float32(0))
        latents = jnp.where(i == 1, start, latents)
        history = jnp.where(i == 1, history, outputs[:3])
        return combined, latents, (start, history)


def from_config(
    config: SchedulerConfig, num_inference_steps: int, sigmas: Sequence[float | int] | None = None
) -> Scheduler:
    """Return the sampler that a folder's scheduler_config.json describes.

    Args:
      sigmas: one a step in place of the grid of flow matching: in (0, 1], descending, before the
        config's shift, as stock pipelines take them.
    Raises:
      InputError: the class, a field or the number of steps is not supported.
    """
    n, fields = num_inference_steps, config.sampling
    if config.is_flow:
        if sigmas is None and config.even_sigmas:
            sigmas = even_sigmas(n)
        return flow_matching(
            fields["num_train_timesteps"],
            fields["shift"],
            n,
            sigmas,
            terminal=fields["shift_terminal"],
            stochastic=fields["stochastic_sampling"],
        )
    _check_positive(n)
    if sigmas is not None:
        raise InputError(f"sigmas are for {FLOW_MATCHING}, the folder has {config.class_name}")
    noise = config.noise
    assert isinstance(noise, VariancePreserving)  # since it is not flow matching
    if n > noise.num_train_timesteps:
        raise InputError(
            f"num_inference_steps={n} is more than the"
            f" {noise.num_train_timesteps} timesteps the network was trained on"
        )
    build = {
        "DDIMScheduler": _ddim,
        "EulerDiscreteScheduler": _euler,
        "LCMScheduler": _lcm,
        "PNDMScheduler": _pndm,
    }
    return build[config.class_name](noise, fields, n)


def from_folder(
    config: SchedulerConfig, num_inference_steps: int, sigmas: Sequence[float | int] | None = None
) -> Scheduler:
    """Return `from_config`, or DDIM on the same noise where the sampler is not implemented here.

    A warning says that it is DDIM.
    """
    try:
        config.sampling  # noqa: B018
    except InputError as problem:
        if config.is_flow:
            raise
        config = config.trailing_ddim()  # unless the noise itself is the problem
        warnings.warn(
            f"images are drawn with DDIM, not with the folder's sampler: {problem}", stacklevel=2
        )
    return from_config(config, num_inference_steps, sigmas)


def even_sigmas(n: int) -> list[float]:
    """Return 1, ..., 1 / n: evenly spaced noise levels of flow matching, before the shift."""
    return [1 - i / n for i in range(n)]


def flow_matching(
    total: int,
    shift: float | int,
    n: int,
    sigmas: Sequence[float | int] | None = None,
    *,
    terminal: float | int | None = None,
    stochastic: bool = False,
) -> Scheduler:
    """Return the Euler sampler of flow matching.

    Args:
      total: timesteps of training; the timestep fed to the network is sigma times this.
      n: number of steps.
      sigmas: before the shift; by default those of diffusers.
      terminal: after the shift, sigmas are stretched so that the last step starts here.
      stochastic: each step draws all its noise anew.
    Raises:
      InputError: the numbers do not fit each other.
    """
    _check_positive(n)

    def shifted(sigmas: NDArray) -> NDArray:
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    if sigmas is None:
        # diffusers spaces between extremes already shifted and shifts again: at shift 3 the last
        # of four steps starts at 0.009. That is what stock pipelines do.
        ends = shifted(np.asarray([1, 1 / total], np.float32))
        start, end = ends.astype(np.float64) * total
        spaced = np.linspace(start, end, n) / total
    elif len(sigmas) != n:
        raise InputError(f"{len(sigmas)} sigmas given for num_inference_steps={n}: give one a step")
    else:
        spaced = np.asarray(sigmas, np.float32)
    levels = shifted(spaced)
    if terminal:
        if n == 1:
            raise InputError(
                "shift_terminal is where the last of several steps starts: a single "
                "step cannot be stretched to it"
            )
        levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    levels = np.append(levels, 0).astype(np.float32)
    return Scheduler(
        timesteps=levels[:-1] * np.float32(total),
        init_noise_sigma=1.0,
        prediction_type=FlowMatching.prediction_type,
        input_scales=np.ones(n, np.float32),
        alphas=1 - levels[:-1],
        sigmas=levels[:-1],
        next_alphas=1 - levels[1:],
        next_sigmas=levels[1:],
        noise_stds=levels[1:],
        eta=1.0 if stochastic else 0.0,
    )


def _check_positive(num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise InputError(f"num_inference_steps={num_inference_steps} must be at least 1")


def _spaced_timesteps(total: int, fields: Fields, n: int) -> NDArray:
    """Return [n] float64, descending, whole but for linspace: table 2 of Lin et al. 2305.08891."""
    if fields["timestep_spacing"] == "linspace":
        return np.linspace(0, total - 1, n)[::-1]
    if fields["timestep_spacing"] == "leading":
        return (np.arange(n) * (total // n))[::-1] + float(fields["steps_offset"])
    # Trailing. At some n (61, 103, ...) arange has one point too many, by rounding. diffusers
    # visits it as timestep -1; we do not.
    return np.round(np.arange(total, 0, -total / n))[:n] - 1


def _variance_preserving(
    noise: VariancePreserving,
    fields: Fields,
    timesteps: NDArray[np.int64],
    here: NDArray[np.int64],
    there: NDArray[np.int64],
    *,
    takes_eta: bool = False,
    clip_range: float | None = None,
    multistep_weights: NDArray | None = None,
) -> Scheduler:
    """Return steps from timesteps `here` to `there`; below timestep 0 lies the final alpha."""
    products = noise.alphas_cumprod
    if here.max() >= len(products):
        raise InputError(
            f"steps_offset={fields['steps_offset']} puts a step at timestep {here.max()}, but the"
            f" network was trained on 0 to {len(products) - 1}: take fewer steps"
        )
    final = 1.0 if fields.get("set_alpha_to_one", True) else products[0]
    now, after = products[here], np.where(there >= 0, products[there], final)
    if noise.prediction_type == "epsilon" and now.min() == 0:
        raise InputError(
            "rescale_betas_zero_snr=True with prediction_type='epsilon' starts at pure noise, whose"
            " epsilon tells nothing of the image: use timestep_spacing='leading'"
        )
    return Scheduler(
        timesteps=timesteps.astype(np.int32),
        init_noise_sigma=1.0,
        prediction_type=noise.prediction_type,
        input_scales=np.ones(len(timesteps), np.float32),
        alphas=np.sqrt(now).astype(np.float32),
        sigmas=np.sqrt(1 - now).astype(np.float32),
        next_alphas=np.sqrt(after).astype(np.float32),
        next_sigmas=np.sqrt(1 - after).astype(np.float32),
        # DDIM, equation 16: at eta = 1 the posterior of DDPM.
        noise_stds=np.sqrt((1 - after) / (1 - now) * (1 - now / after)).astype(np.float32),
        takes_eta=takes_eta,
        clip_range=clip_range,
        multistep_weights=multistep_weights,
    )


def _ddim(noise: VariancePreserving, fields: Fields, n: int) -> Scheduler:
    timesteps = np.round(_spaced_timesteps(noise.num_train_timesteps, fields, n)).astype(int)
    # diffusers steps down by the mean spacing, whatever timestep is visited next.
    there = timesteps - noise.num_train_timesteps // n
    clip_range = float(fields["clip_sample_range"]) if fields["clip_sample"] else None
    return _variance_preserving(
        noise, fields, timesteps, timesteps, there, takes_eta=True, clip_range=clip_range
    )


def _lcm(noise: VariancePreserving, fields: Fields, n: int) -> Scheduler:
    """Return n of the original steps, evenly spaced; each draws all its noise anew.

    diffusers mixes a little of the noisy latents into x0, below 1e-5 from timestep 16 on. Here x0
    is not mixed, so earlier timesteps are an error.
    """
    original = fields["original_inference_steps"]
    if not n <= original <= noise.num_train_timesteps:
        raise InputError(
            f"LCMScheduler with original_inference_steps={original} does not draw in {n} steps: "
            f"expected {n} to {noise.num_train_timesteps}"
        )
    spacing = noise.num_train_timesteps // original
    chosen = np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)
    timesteps = (original - chosen) * spacing - 1
    if timesteps[-1] < 16:
        raise InputError(
            f"LCMScheduler in {n} steps ends at timestep {timesteps[-1]}, which is not "
            "supported: take fewer steps"
        )
    there = np.append(timesteps[1:], -1)
    clip_range = float(fields["clip_sample_range"]) if fields["clip_sample"] else None
    steps = _variance_preserving(noise, fields, timesteps, timesteps, there, clip_range=clip_range)
    return dataclasses.replace(steps, noise_stds=steps.next_sigmas, eta=1.0)


def _pndm(noise: VariancePreserving, fields: Fields, n: int) -> Scheduler:
    """Return n + 1 network calls for n > 1: call 1 redoes step 0."""
    spacing = noise.num_train_timesteps // n
    timesteps = np.round(_spaced_timesteps(noise.num_train_timesteps, fields, n)).astype(int)
    # Calls 1 and 2 are at the second timestep. Call 1 starts one spacing before it and ends there.
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    here = timesteps + spacing * (np.arange(len(timesteps)) == 1)
    first = [[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0]]
    rows = first + [[55, -59, 37, -9]] * n
    weights = np.asarray(rows[: len(timesteps)], np.float32) / 24
    return _variance_preserving(
        noise, fields, timesteps, here, here - spacing, multistep_weights=weights
    )


def _euler(noise: VariancePreserving, fields: Fields, n: int) -> Scheduler:
    timesteps = _spaced_timesteps(noise.num_train_timesteps, fields, n).astype(np.float32)
    products = noise.alphas_cumprod.astype(np.float32)
    if noise.rescale_betas_zero_snr:
        products[-1] = 2**-24  # as diffusers, which keeps sigma / alpha finite
    train_sigmas = np.sqrt((1 - products) / products)
    sigmas = np.interp(timesteps, np.arange(len(train_sigmas)), train_sigmas)
    if fields["use_karras_sigmas"]:
        # Evenly spaced in sigma^(1/7) (Karras et al. 2206.00364, equation 5).
        most = sigmas[0] if fields["sigma_max"] is None else fields["sigma_max"]
        least = sigmas[-1] if fields["sigma_min"] is None else fields["sigma_min"]
        sigmas = np.linspace(most ** (1 / 7), least ** (1 / 7), n) ** 7
        timesteps = np.interp(np.log(sigmas), np.log(train_sigmas), np.arange(len(train_sigmas)))
    last = train_sigmas[0] if fields["final_sigmas_type"] == "sigma_min" else 0
    sigmas = np.append(sigmas, last).astype(np.float32)
    if fields["timestep_type"] == "continuous" and noise.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:-1])
    init_noise_sigma = sigmas.max()
    if fields["timestep_spacing"] == "leading":
        init_noise_sigma = np.sqrt(init_noise_sigma**2 + 1)
    return Scheduler(
        timesteps=timesteps.astype(np.float32),
        init_noise_sigma=float(init_noise_sigma),
        prediction_type=noise.prediction_type,
        input_scales=(1 / np.sqrt(sigmas[:-1].astype(np.float64) ** 2 + 1)).astype(np.float32),
        alphas=np.ones(n, np.float32),
        sigmas=sigmas[:-1],
        next_alphas=np.ones(n, np.float32),
        next_sigmas=sigmas[1:],
    )
