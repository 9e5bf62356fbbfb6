"""The grid that a K-step generator is trained on, and how a stock sampler comes to visit it.

    variance preserving: trailing timesteps, e.g. 999, 749, 499, 249, the last step ending at 0
    flow matching:       sigmas 1, .75, .5, .25, 0 before the shift of the folder's own scheduler

Which of both is said by the class of the folder's scheduler.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from r0_jax.diffusion import schedulers
from r0_jax.diffusion.schedulers import FLOW_MATCHING, Scheduler, is_flow
from r0_jax.errors import InputError

MOST_STEPS = 4  # of a generator


def grid(config: Mapping[str, Any], num_steps: int) -> Scheduler:
    """The deterministic sampler of `num_steps` network calls, from a pretrained folder's
    scheduler_config.json."""
    if is_flow(config):
        return _flow(config, num_steps)
    return schedulers.from_config(scheduler_config(config, num_steps), num_steps)


def of_folder(
    config: Mapping[str, Any], num_steps: int, levels: Sequence[float | int] | None = None
) -> Scheduler:
    """The folder's own sampler. One of flow matching takes `levels`; in few steps by default those
    of `grid`, where diffusers would go down to nearly 0, unless its shift_terminal says where they
    end, as in our exports."""
    few = num_steps <= MOST_STEPS and not config.get("shift_terminal")
    if levels is None and is_flow(config) and few:
        levels = sigmas(num_steps)
    return schedulers.from_folder(config, num_steps, levels)


def noise_levels(config: Mapping[str, Any]) -> Scheduler:
    """Every noise level that the folder's network was trained on, noisiest first, as a sampler."""
    if is_flow(config):
        return _flow(config, schedulers.read(config)[1]["num_train_timesteps"])
    ddim = schedulers.ddim_config(config)
    return schedulers.from_config(ddim, ddim["num_train_timesteps"])


def scheduler_config(config: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """The scheduler_config.json to export: `num_inference_steps=num_steps` of a stock pipeline
    visits `grid`. InputError names what of the folder's own is not supported."""
    if is_flow(config):
        return _flow_config(config, num_steps)
    return schedulers.ddim_config(config)


def sigmas(num_steps: int) -> list[float]:
    """1, ..., 1 / num_steps: the grid of flow matching before the shift."""
    return [1 - i / num_steps for i in range(num_steps)]


def shift(config: Mapping[str, Any]) -> float:
    """The shift that the network of a flow-matching folder was trained with.

    The folder may be an export of ours, whose scheduler has another shift and a terminal: both
    come from the true one by `_flow_config`, which is solved for it here. InputError names a field
    that is not supported.
    """
    _, fields = schedulers.read(config)
    found, last = fields["shift"], fields["shift_terminal"]
    if not last:
        return float(found)
    least = 1 / fields["num_train_timesteps"]
    least = found * least / (1 + (found - 1) * least)
    share, a = (found - 1) * (1 - least) / found, (1 - last) / last
    true = (share + a) / (a * (1 - share))
    if not 1e-3 <= true <= 1e3:
        raise InputError(
            f"{FLOW_MATCHING} with shift={found} and shift_terminal={last} is not "
            "supported: no shift alone makes such sigmas; set shift_terminal to null"
        )
    return true


def _flow(config: Mapping[str, Any], num_steps: int) -> Scheduler:
    plain = {**config, "shift": shift(config), "shift_terminal": None}
    if plain.get("stochastic_sampling"):
        raise InputError(
            f"{FLOW_MATCHING} with stochastic_sampling=true is not supported in "
            "training: set it to false"
        )
    return schedulers.from_config(plain, num_steps, sigmas(num_steps))


def _flow_config(config: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Left alone, diffusers spaces its sigmas evenly from 1 to the least one that it knows, shifts
    them and, with a shift_terminal, stretches them to end there. With t = k / K and the true
    shift S, the trained grid is

        1 - sigma_k = t / (S - (S - 1) t),      k = 0, ..., K - 1

    which another shift s and the right end make of even spacing too. For both to be proportional,
    (s - 1) (1 - least(s)) / s = (S - 1) (K - 1) / (S K): a quadratic equation in s.
    """
    _flow(config, num_steps)  # names what is not supported
    true, total = shift(config), schedulers.read(config)[1]["num_train_timesteps"]
    kept = {"_class_name": FLOW_MATCHING, "num_train_timesteps": total}
    if num_steps == 1:
        return kept | {"shift": true}
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
    return kept | {"shift": found, "shift_terminal": true / (num_steps + true - 1)}
