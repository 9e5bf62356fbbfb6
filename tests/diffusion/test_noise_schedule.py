"""The noise of each scheduler class of diffusers, and that training asks no more."""

import json
import pathlib

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest

from r0_jax.diffusion import grid, noise_schedule, scheduler_config
from r0_jax.diffusion.scheduler_config import SchedulerConfig

parse = SchedulerConfig.from_json

# diffusers 0.42 under numpy 2: NumPy's functions on torch tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
diffusers.logging.set_verbosity_error()  # it logs a line for each field that a class does not read

CONFIGS = pathlib.Path(__file__).parents[1] / "data" / "scheduler_configs"
REAL = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(CONFIGS.glob("*.json"))}
CLASSES = sorted(scheduler_config._NOISE)
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
    ours, expected = parse(config).noise.alphas_cumprod, theirs(config).alphas_cumprod.numpy()
    if expected[-1] == 2**-24:  # of classes that divide by it, in place of the 0 of training
        expected[-1] = 0
    assert ours.dtype == np.float64 and not ours.flags.writeable
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
    expected = grid.grid(
        parse({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"} | SD), 4
    )
    ours = grid.grid(parse(config), 4)
    assert ours.timesteps.tolist() == [999, 749, 499, 249]
    assert ours.prediction_type == "v_prediction"
    np.testing.assert_array_equal(ours.alphas, expected.alphas)
    levels = grid.noise_levels(parse(config))
    np.testing.assert_allclose(levels.alphas[::-1] ** 2, theirs(config).alphas_cumprod, rtol=1e-6)
    # The export is a stock DDIM that visits it, with the betas of this class's defaults too.
    for fields in (config, {"_class_name": name}):
        exported = grid.exported(parse(fields), 4)
        assert exported.class_name == "DDIMScheduler"
        stock = diffusers.DDIMScheduler.from_config(exported.fields)
        np.testing.assert_allclose(stock.alphas_cumprod, theirs(fields).alphas_cumprod, rtol=1e-6)
        stock.set_timesteps(4)
        assert stock.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_all_trainable(name):
    ours = grid.grid(parse(REAL[name]), 4)
    assert len(ours.timesteps) == 4 and ours.next_sigmas[-1] == 0


def test_a_field_that_the_class_does_not_read_plays_no_part():
    pndm = {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True, **SD}
    assert parse(pndm).noise.alphas_cumprod[-1] > 1e-3
    assert grid.exported(parse(pndm), 4).fields["rescale_betas_zero_snr"] is False


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_what_a_network_should_say_stands_for_the_clean_latents_and_the_noise(kind):
    rng = np.random.default_rng(0)
    x0, epsilon = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(2))
    sigma = jnp.float32(0.6)
    alpha = 1 - sigma if kind == "flow_prediction" else jnp.float32(0.8)
    output = noise_schedule.model_output(kind, x0, epsilon, alpha, sigma)
    latents = alpha * x0 + sigma * epsilon
    found = noise_schedule.x0_and_epsilon(kind, output, latents, alpha, sigma)
    np.testing.assert_allclose(found, (x0, epsilon), atol=1e-5)
