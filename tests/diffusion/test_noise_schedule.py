"""What each scheduler class of diffusers says of the noise, and that training asks no more."""

import json
import pathlib

import diffusers
import numpy as np
import pytest

from r0_jax.diffusion import grid as few_step
from r0_jax.diffusion import noise_schedule, schedulers
from r0_jax.errors import InputError

# diffusers 0.42 under numpy 2: NumPy's functions on torch tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
diffusers.logging.set_verbosity_error()  # it logs a line for each field that a class does not read

CONFIGS = pathlib.Path(__file__).parents[1] / "data" / "scheduler_configs"
REAL = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(CONFIGS.glob("*.json"))}
CLASSES = sorted(noise_schedule._CLASSES)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def theirs(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        {},  # the defaults, which are not the same for all classes
        {"beta_schedule": "linear"},
        SD,
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.001, 0.5, 20).tolist(), "num_train_timesteps": 20},
    ],
    ids=["defaults", "linear", "stable diffusion", "cosine", "trained"],
)
@pytest.mark.parametrize("name", CLASSES)
def test_alphas_cumprod(name, schedule, rescale_betas_zero_snr):
    config = {"_class_name": name, "rescale_betas_zero_snr": rescale_betas_zero_snr} | schedule
    ours, expected = noise_schedule.alphas_cumprod(config), theirs(config).alphas_cumprod
    assert ours.dtype == np.float64
    # Rescaling subtracts nearly equal numbers at the end of the schedule.
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-9 * rescale_betas_zero_snr)
    assert ours[-1] == expected[-1] or ours[-1] > 1e-9


@pytest.mark.parametrize("name", CLASSES)
def test_any_class_is_trained_on_the_same_grid(name):
    config = {
        "_class_name": name,
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "timestep_spacing": "linspace",
    } | SD
    expected = few_step.grid(
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"} | SD, 4
    )
    grid = few_step.grid(config, 4)
    assert grid.timesteps.tolist() == [999, 749, 499, 249]
    assert grid.prediction_type == "v_prediction"
    np.testing.assert_array_equal(grid.alphas, expected.alphas)
    levels = few_step.noise_levels(config)
    np.testing.assert_allclose(levels.alphas[::-1] ** 2, theirs(config).alphas_cumprod, rtol=1e-6)
    # The export is a stock DDIM that visits it, with the betas of this class's defaults too.
    for fields in (config, {"_class_name": name}):
        exported = few_step.scheduler_config(fields, 4)
        assert exported["_class_name"] == "DDIMScheduler"
        stock = diffusers.DDIMScheduler.from_config(exported)
        np.testing.assert_allclose(stock.alphas_cumprod, theirs(fields).alphas_cumprod, rtol=1e-6)
        stock.set_timesteps(4)
        assert stock.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_all_trainable(name):
    grid = few_step.grid(REAL[name], 4)
    assert len(grid.timesteps) == 4 and grid.next_sigmas[-1] == 0


def test_a_field_that_the_class_does_not_read_plays_no_part():
    pndm = {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True, **SD}
    assert noise_schedule.alphas_cumprod(pndm)[-1] > 1e-3
    assert few_step.scheduler_config(pndm, 4)["rescale_betas_zero_snr"] is False


@pytest.mark.parametrize(
    "config, said",
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
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
    with pytest.raises(InputError, match=said) as error:
        noise_schedule.alphas_cumprod(config)
    assert len(str(error.value).splitlines()) == 1


def test_steps_of_training_need_no_sampler_of_this_name():
    """Which `schedulers` knows none of."""
    unknown = [name for name in CLASSES if name not in schedulers._FIELDS]
    assert "DPMSolverMultistepScheduler" in unknown and len(unknown) >= 10
