"""What a scheduler_config.json says, and what of it is not supported."""

import pytest

from r0_jax.diffusion import grid, scheduler_config
from r0_jax.diffusion.noise_schedule import FlowMatching
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError

parse = SchedulerConfig.from_json
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def test_defaults_are_those_of_the_class():
    heun, euler, ddim = (
        parse({"_class_name": f"{name}Scheduler"})
        for name in ("HeunDiscrete", "EulerDiscrete", "DDIM")
    )
    assert (heun.noise.beta_start, ddim.noise.beta_start) == (0.00085, 0.0001)
    spacings = (euler.sampling["timestep_spacing"], ddim.sampling["timestep_spacing"])
    assert spacings == ("linspace", "leading")
    assert ddim.fields == {"_class_name": "DDIMScheduler"} and not ddim.is_flow


@pytest.mark.parametrize("shift", [1, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_shift_is_that_of_training(shift, steps):
    config = parse(FLOW | {"shift": shift})
    assert config.is_flow and config.noise == FlowMatching(1000, float(shift))
    export = grid.exported(config, steps)
    assert (export.fields["shift"] == shift) == (steps == 1 or shift == 1)
    assert export.noise.shift == pytest.approx(shift)


@pytest.mark.parametrize(
    "fields, noise, sampling",
    [
        ({"_class_name": "DDIMScheduler"}, "", ""),
        ({"_class_name": "LCMScheduler"}, "", ""),
        ({"_class_name": "TCDScheduler"}, "", "'TCDScheduler' is not supported"),
        ({"_class_name": "PNDMScheduler"}, "", "skip_prk_steps=False"),  # its default
        ({"_class_name": "DDIMScheduler", "beta_end": 2}, "found 2", "found 2"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "no betas", "is not supported"),
        ({}, "None has no betas", "None is not supported"),
        (FLOW | {"stochastic_sampling": True}, "", ""),
        (FLOW | {"shift": 0.1, "shift_terminal": 0.5}, "no shift alone", ""),
        (FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting", "use_dynamic_shifting"),
    ],
)
def test_an_error_waits_for_who_asks_for_the_part(fields, noise, sampling):
    config = parse(fields)
    for part, said in (("noise", noise), ("sampling", sampling)):
        if not said:
            getattr(config, part)
            continue
        for _ in range(2):  # each time
            with pytest.raises(InputError, match=said):
                getattr(config, part)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"_class_name": "CogVideoXDDIMScheduler"}, "'CogVideoXDDIMScheduler' has no betas"),
        ({"_class_name": ["DDIMScheduler"]}, r"\['DDIMScheduler'\] has no betas"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas=True",
        ),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "beta_schedule='laplace'"),
        ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"}, "beta_schedule='exp'"),
        ({"_class_name": "LCMScheduler", "num_train_timesteps": 0}, "num_train_timesteps=0"),
        (
            {"_class_name": "DDPMScheduler", "trained_betas": [2.0], "num_train_timesteps": 1},
            "trained_betas: .* found 2.0",
        ),
    ],
)
def test_what_is_not_supported_is_named(config, said):
    parsed = parse(config)  # a folder opens whatever its scheduler is
    with pytest.raises(InputError, match=said) as error:
        parsed.noise  # noqa: B018
    assert len(str(error.value).splitlines()) == 1


def test_more_classes_can_be_trained_on_than_drawn_with():
    unknown = scheduler_config._NOISE.keys() - scheduler_config._SAMPLING.keys()
    assert "DPMSolverMultistepScheduler" in unknown and len(unknown) >= 10
