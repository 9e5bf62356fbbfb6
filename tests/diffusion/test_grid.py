"""The trained grid, from stock samplers."""

import re

import diffusers
import numpy as np
import pytest

from r0_jax.diffusion import grid, schedulers
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError

parse = SchedulerConfig.from_json

DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_stock_flow_matching_visits_the_trained_grid(shift, steps):
    base = parse(FLOW | {"shift": shift})
    plain = np.asarray([1 - i / steps for i in range(steps)])
    expected = shift * plain / (1 + (shift - 1) * plain)
    ours = grid.grid(base, steps)
    np.testing.assert_allclose(ours.sigmas, expected, rtol=1e-6)
    np.testing.assert_allclose(ours.timesteps, 1000 * expected, rtol=1e-6)
    assert ours.next_sigmas[-1] == 0
    config = grid.exported(base, steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config.fields)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(scheduler.sigmas[:-1], expected, rtol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps, ours.timesteps, rtol=1e-6)
    np.testing.assert_allclose(schedulers.from_config(config, steps).sigmas, expected, rtol=1e-6)


# Of Z-Image-Turbo (shift 3) and Z-Image (shift 6), computed by diffusers 0.42.1.
EVEN = {
    (3.0, 4): [1, 0.9, 0.75, 0.5],
    (3.0, 8): [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3],
    (6.0, 2): [1, 0.857143],
    (6.0, 4): [1, 0.947368, 0.857143, 0.666667],
    (6.0, 9): [1, 0.979592, 0.954546, 0.923077, 0.882353, 0.827586, 0.75, 0.631579, 0.428571],
}


@pytest.mark.parametrize(("shift", "steps"), EVEN)
@pytest.mark.parametrize("eta", [0, 1])
def test_a_pipeline_that_hands_out_even_sigmas_needs_no_other_shift(shift, steps, eta):
    base = parse(FLOW | {"shift": shift}, even_sigmas=True)
    expected, config = EVEN[shift, steps], grid.exported(base, steps, eta)
    assert config.fields["shift"] == shift and "shift_terminal" not in config.fields
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config.fields)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    np.testing.assert_allclose(stock.sigmas[:-1], expected, atol=1e-6)
    assert stock.config.stochastic_sampling == (eta == 1)
    for found in (
        schedulers.from_config(config, steps),
        grid.of_folder(base, steps),
        grid.grid(config, steps, eta),
    ):
        np.testing.assert_allclose(found.sigmas, expected, atol=1e-6)
        np.testing.assert_allclose(found.timesteps, stock.timesteps, rtol=1e-6)


def test_an_export_is_trained_on_the_grid_of_its_base():
    base = parse(FLOW | {"shift": 3.0})
    again = grid.exported(base, 4)
    assert again.fields["shift"] != 3 and again.noise.shift == pytest.approx(3.0)
    np.testing.assert_allclose(grid.grid(again, 2).sigmas, grid.grid(base, 2).sigmas)
    np.testing.assert_allclose(
        grid.noise_levels(again).sigmas, grid.noise_levels(base).sigmas, rtol=1e-6
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("fields", [FLOW | {"shift": 3.0}, DDIM], ids=lambda x: x["_class_name"])
def test_the_grid_with_fresh_noise_is_that_of_its_export(fields, steps):
    base = parse(fields)
    ours, exported = grid.grid(base, steps, 1), grid.exported(base, steps, 1)
    theirs = schedulers.from_config(exported, steps)  # test_schedulers.py holds it to diffusers
    assert ours.needs_noise and theirs.needs_noise
    for name in ("timesteps", "sigmas", "next_sigmas", "noise_stds"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-5)
    np.testing.assert_array_equal(ours.noise_stds, ours.next_sigmas)  # all of it is fresh
    if steps in (1, 2, 4):  # LCM cannot visit thirds of 1000
        np.testing.assert_allclose(ours.sigmas, grid.grid(base, steps).sigmas, rtol=1e-6)
    # A run may start from such an export, with or without fresh noise.
    np.testing.assert_allclose(grid.grid(exported, steps).sigmas, grid.grid(base, steps).sigmas)


def test_noise_levels_are_those_of_training():
    levels = grid.noise_levels(parse(FLOW | {"shift": 3.0}))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # all of them, until told else
    np.testing.assert_allclose(levels.sigmas, theirs.sigmas, rtol=1e-6)
    np.testing.assert_allclose(levels.timesteps, theirs.timesteps, rtol=1e-6)
    vp = grid.noise_levels(parse({"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}))
    assert vp.timesteps.tolist() == list(range(999, -1, -1))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "field, value, expected",
    [
        *(
            ("shift", value, "a number from 0.001 to 1000")
            for value in (0, -3.0, NAN, INFINITY, 1e9)
        ),
        *(("shift", value, r"supported: int \| float") for value in (None, "3.0", [3.0])),
        *(
            ("shift_terminal", value, "null, or a number from 0 to below 1")
            for value in (1.0, -0.5, 2, NAN, INFINITY)
        ),
        ("shift_terminal", "x", r"supported: int \| float \| None"),
        *(("num_train_timesteps", value, "at least 2") for value in (1, 0, -1)),
        *(("num_train_timesteps", value, "<class 'int'>") for value in (None, "1000", 1e3)),
    ],
)
def test_numbers_that_make_no_schedule_are_named(field, value, expected):
    config = parse(FLOW | {"shift": 3.0, "shift_terminal": 0.1} | {field: value})
    said = f"FlowMatchEulerDiscreteScheduler with {field}={re.escape(repr(value))} .*{expected}"
    for function in (
        grid.noise_levels,
        lambda config: grid.grid(config, 4),
        lambda config: grid.exported(config, 4),
        lambda config: schedulers.from_folder(config, 4),
    ):
        with pytest.raises(InputError, match=said) as error:
            function(config)
        assert "\n" not in str(error.value)


def test_numbers_that_make_no_schedule_together():
    config = parse(FLOW | {"shift": 0.1, "shift_terminal": 0.5})
    with pytest.raises(InputError, match=r"shift=0\.1 and shift_terminal=0.5 .* to null"):
        grid.grid(config, 4)
    assert grid.of_folder(config, 4).sigmas[-1] == pytest.approx(0.5)  # drawing needs no shift
    two = parse(FLOW | {"shift": 3.0, "num_train_timesteps": 2})
    assert grid.exported(two, 1).fields["shift"] == 3
    with pytest.raises(InputError, match=r"timesteps=2 is .* with shift 3 in 4 steps: take"):
        grid.exported(two, 4)
    with pytest.raises(InputError, match="num_train_timesteps=0: at least 1"):
        grid.noise_levels(parse({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}))


@pytest.mark.parametrize(
    "fields, said",
    [
        (FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler"),
    ],
)
def test_what_is_not_supported_is_named(fields, said):
    for function in (grid.grid, grid.exported):
        with pytest.raises(InputError, match=said):
            function(parse(fields), 4)
