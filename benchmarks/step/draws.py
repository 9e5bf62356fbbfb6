"""What is random in a step, drawn by the package, for a twin that has other generators."""

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from r0_jax.diffusion import rollout
from r0_jax.method import directions, objective, train_step
from r0_jax.method.train_state import TrainState
from r0_jax.training.program import Program

# The keys and tags are private in the package: nothing but a copy of a step needs them. Where they
# change and this does not, the check of the first step fails.


def of_step(
    built: Program, state: TrainState, batch: dict[str, jax.Array], key: jax.Array
) -> dict[str, NDArray]:
    """Return what the step that follows `state` draws, for B samples and K network calls.

    Images [B, h, w, c] are "noise", "fresh" (of each call, [K, ...]) and "level_noise". "eta"
    [K, B] is the share of the noise that is drawn anew. "level" [B], from 0 to 1, chooses the level
    at which the guided base looks.
    """
    keys, _, _ = train_step._draws(built.objective, state, batch, key)
    in_rollout = objective._fold(keys, objective._ROLLOUT)
    eta_keys, noise_keys = (objective._fold(in_rollout, tag) for tag in (0, 1))
    in_terms = objective._fold(keys, objective._REGULARIZERS)
    shape, calls = built.pipeline.latent_shape, range(built.config.sampler.num_steps)
    sampler = built.config.sampler
    drawn: dict[str, Any] = {
        "noise": rollout.normal(keys, objective._NOISE, shape),
        "fresh": [rollout.normal(noise_keys, i, shape) for i in calls],
        "eta": [
            rollout.uniform(eta_keys, i)
            if sampler.random_eta
            else np.full(len(keys), sampler.eta, np.float32)
            for i in calls
        ],
        "level": rollout.uniform(in_terms, directions._GUIDANCE),
        "level_noise": rollout.normal(in_terms, directions._GUIDANCE + 1, shape),
    }
    return {name: np.asarray(value) for name, value in drawn.items()}


def last_calls(
    built: Program, state: TrainState, batch: dict[str, jax.Array], key: jax.Array, steps: int
) -> NDArray[np.int32]:
    """Return the call that is rewarded in each of the steps 0 to `steps` - 1, int32 [steps]."""
    found = [
        train_step._draws(built.objective, state._replace(step=np.int32(n)), batch, key)[1].last
        for n in range(steps)
    ]
    return np.asarray(found, np.int32)
