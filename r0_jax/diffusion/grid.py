"""The grid that a K-step generator is trained on, and a stock sampler that visits it.

    variance preserving: trailing timesteps, e.g. 999, 749, 499, 249, the last step ending at 0
    flow matching:       sigmas 1, .75, .5, .25, 0 before the shift of training

The noise of training decides which of both it is. Of the noise of each step a share eta is drawn
anew: none (eta 0: DDIM or Euler) or all of it (eta 1: LCM, or stochastic flow matching). Stock
samplers have no share in between.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from r0_jax.diffusion import schedulers
from r0_jax.diffusion.noise_schedule import FlowMatching
from r0_jax.diffusion.scheduler_config import FLOW_MATCHING, SchedulerConfig
from r0_jax.diffusion.schedulers import Scheduler
from r0_jax.errors import InputError

MOST_STEPS = 4  # of a generator


def grid(config: SchedulerConfig, num_steps: int, eta: float | int = 0) -> Scheduler:
    """Return the sampler of `num_steps` network calls; `eta` is 0 or 1.

    Raises:
      InputError: the noise of the folder's network is not supported.
    """
    noise = config.noise
    if isinstance(noise, FlowMatching):
        return _flow(noise, num_steps, stochastic=eta == 1)
    return schedulers.from_config(_variance_preserving(config, num_steps, eta), num_steps)


def of_folder(
    config: SchedulerConfig, num_steps: int, levels: Sequence[float | int] | None = None
) -> Scheduler:
    """Return the folder's own sampler.

    Args:
      levels: sigmas for a sampler of flow matching. In few steps the default is those of `grid`,
        where diffusers would go down to nearly 0. An export of ours keeps its own: its
        shift_terminal says where they end.
    """
    if levels is None and config.is_flow and num_steps <= MOST_STEPS:
        if not config.sampling["shift_terminal"]:
            levels = schedulers.even_sigmas(num_steps)
    return schedulers.from_folder(config, num_steps, levels)


def noise_levels(config: SchedulerConfig) -> Scheduler:
    """Return every noise level of training as a sampler, noisiest first.

    Raises:
      InputError: the noise of the folder's network is not supported.
    """
    noise = config.noise
    if isinstance(noise, FlowMatching):
        return _flow(noise, noise.num_train_timesteps)
    return schedulers.from_config(config.trailing_ddim(), noise.num_train_timesteps)


def levels_after(steps: Scheduler, table: Scheduler) -> NDArray[np.float32]:
    """Return where each step of a grid ends, as a share of the trained timesteps, float32 [K].

    `table` is `noise_levels`. The last step ends at 0, the clean image.
    """
    # Descending in the table, so the levels at most as noisy are those after it.
    below = table.sigmas[None] <= steps.next_sigmas[:, None] + 1e-6
    return (below.sum(axis=1) / len(table.sigmas)).astype(np.float32)


def exported(config: SchedulerConfig, num_steps: int, eta: float | int = 0) -> SchedulerConfig:
    """Return the scheduler to export: `num_steps` steps of a stock pipeline draw as `grid` does.

    Raises:
      InputError: the folder's noise is not supported, or not with so many steps.
    """
    noise = config.noise
    if isinstance(noise, FlowMatching):
        return _exported_flow(noise, num_steps, config.even_sigmas, stochastic=eta == 1)
    return _variance_preserving(config, num_steps, eta)


def _variance_preserving(
    config: SchedulerConfig, num_steps: int, eta: float | int
) -> SchedulerConfig:
    return config.lcm(num_steps) if eta == 1 else config.trailing_ddim()


def _flow(noise: FlowMatching, num_steps: int, *, stochastic: bool = False) -> Scheduler:
    return schedulers.flow_matching(
        noise.num_train_timesteps,
        noise.shift,
        num_steps,
        schedulers.even_sigmas(num_steps),
        stochastic=stochastic,
    )


def _exported_flow(
    noise: FlowMatching, num_steps: int, even_sigmas: bool, *, stochastic: bool
) -> SchedulerConfig:
    """Return a scheduler of another shift and a terminal, unless it is given even sigmas.

    Left alone, diffusers spaces its sigmas evenly from 1 to the least one that it knows, shifts
    them and, with a shift_terminal, stretches them to end there. With t = k / K and the true
    shift S, the trained grid is

        1 - sigma_k = t / (S - (S - 1) t),      k = 0, ..., K - 1

    Another shift s and the right end make it of even spacing too. For both to be proportional,
    (s - 1) (1 - least(s)) / s = (S - 1) (K - 1) / (S K): a quadratic equation in s.
    `scheduler_config` solves it for S.
    """
    _flow(noise, num_steps)  # an error where there is no such grid
    true, total = noise.shift, noise.num_train_timesteps
    kept = {"_class_name": FLOW_MATCHING, "num_train_timesteps": total}
    if stochastic:
        kept["stochastic_sampling"] = True
    if num_steps == 1 or even_sigmas:
        return SchedulerConfig.from_json(kept | {"shift": true}, even_sigmas=even_sigmas)
    rest = total - 1
    share = (true - 1) * (num_steps - 1) / (true * num_steps)
    b = (1 - share) * rest
    if b**2 < 4 * share * rest:
        raise InputError(
            f"{FLOW_MATCHING} with num_train_timesteps={total} is not supported with "
            f"shift {true:g} in {num_steps} steps: take fewer steps"
        )
    # The smaller root, written so that it is exact where share is 0.
    found = 2 * rest / (b + math.sqrt(b**2 - 4 * share * rest))
    terminal = true / (num_steps + true - 1)
    return SchedulerConfig.from_json(kept | {"shift": found, "shift_terminal": terminal})
