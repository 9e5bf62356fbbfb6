"""The losses that R0 does without, against PyTorch twins: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_world
import torch
import torch_losses
from ml_collections import ConfigDict
from step_world import SCHEDULER, assert_close, batch, sample_keys

from r0_jax.diffusion import grid, rollout
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.method import directions
from r0_jax.method.context import Context

B, SHAPE = 3, (2, 3, 4)
ROOT = np.sqrt(np.prod(SHAPE))
KINDS = ("epsilon", "v_prediction", "flow")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": torch_losses.SHIFT}


def network(xp, speed, shift):
    """A network of jax.numpy or torch: its output depends on all that it is told."""

    def output(latents, timesteps, prompted=True):
        time = timesteps[:, None, None, None] / 700
        turned = xp.flip(latents, (-1,))
        return xp.sin(speed * turned + time + (shift if prompted else -shift))

    return output


def teacher(xp):
    return network(xp, 1.7, 0.8)


def student(xp):
    return network(xp, 1.1, 0.3)


def context(kind, timestep):
    """A graded call at a timestep, as both sides see it: the context, and x0 and z in float64."""
    rng = np.random.default_rng(0)
    x0, z = (rng.standard_normal((B, *SHAPE)) for _ in range(2))
    given = FLOW if kind == "flow" else SCHEDULER | {"prediction_type": kind}
    config = SchedulerConfig.from_json(given)
    table = grid.noise_levels(config)
    i = 999 - timestep
    at = rollout.Trajectory(
        jnp.asarray(z, jnp.float32),
        jnp.full(B, jnp.float32(table.timesteps[i])),
        jnp.asarray(table.alphas)[i],
        jnp.asarray(table.sigmas)[i],
        jnp.asarray(x0, jnp.float32),
    )
    base, target = teacher(jnp), student(jnp)

    def base_pair(latents, timesteps):
        return base(latents, timesteps), base(latents, timesteps, False)

    made = Context(at, sample_keys(B), base, base_pair, base, target, table)
    return made, torch.tensor(x0, requires_grad=True), torch.tensor(z)


def assert_same(loss, direction, expected, x0):
    """A value, and the direction of its descent in the unit of directions.py."""
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-4)
    (gradient,) = torch.autograd.grad(expected.sum(), x0)
    found = -2 / ROOT * np.asarray(direction)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-3, atol=2e-5)
    assert np.abs(found).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "timestep", "form"),
    [(kind, 499, "huber") for kind in KINDS]
    + [("epsilon", 499, "l2"), ("epsilon", 999, "huber")]
    + [("v_prediction", 19, "huber")],  # from where RG-LCM's step ends at 0
)
def test_consistency_is_rg_lcms(kind, timestep, form):
    made, x0, z = context(kind, timestep)
    options = ConfigDict({"least": 5.0, "most": 15.0, "skip": 0.02, "form": form, "c": 0.05})
    w = 5 + 10 * np.asarray(rollout.uniform(made.keys, 300), np.float64)
    expected = torch_losses.rg_lcm(
        kind,
        x0,
        z,
        torch.full((B,), timestep),
        torch.tensor(w),
        teacher(torch),
        student(torch),
        c=0.05,
        form=form,
    )
    loss = directions.consistency_loss(made, options)(made.x0)
    assert_same(loss, directions.consistency(made, options), expected, x0)


def test_the_target_network_is_the_generator_or_its_average():
    on = {
        "sampler.num_steps": 1,
        "objective.grad_steps": 1,
        "regularizers.consistency.weight": 1.0,
    }
    now = step_world.make(on, rewards=[])
    average = step_world.make(on | {"regularizers.consistency.target": "ema"}, rewards=[])
    _, state, _ = now.step()
    state = state._replace(ema_params=jax.tree.map(lambda x: 0.5 * x, state.params))
    assert now.objective.read(state) == {}
    read = average.objective.read(state)
    assert read["ema"] is state.ema_params

    program = average.program()  # the average is an argument, so it may be any
    (_, _), same = program(
        state.params, average.frozen | {"ema": state.params}, batch(B), sample_keys(B), 0, {}
    )
    (_, _), expected = now.value_and_grad(state.params, batch(B), 0)
    assert_close(same, expected, 1e-6)
    (_, _), other = program(state.params, average.frozen | read, batch(B), sample_keys(B), 0, {})
    worst = max(np.abs(other[k] - same[k]).max() for k in same)
    assert worst > 1e-3 * max(np.abs(x).max() for x in same.values())
