"""Whole trajectories against diffusers, step by step, on a network that is one line of maths."""

import itertools
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from r0_jax.diffusion import schedulers
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError

# diffusers 0.42's Euler under numpy 2: np.array(torch tensor).
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"
)
diffusers.logging.set_verbosity_error()  # it logs a line for each field that a class does not read

CONFIGS = pathlib.Path(__file__).parents[1] / "data" / "scheduler_configs"
REAL = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(CONFIGS.glob("*.json"))}
SUPPORTED = [
    "hyper-sd-nstep-lora",
    "hyper-sdxl-1step-unet",
    "lcm-dreamshaper-v7",
    "sd-v1-5",
    "sd3-medium",
    "sdxl-base-1.0",
    "sdxl-lightning",
]

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
DDIM = SD | {"_class_name": "DDIMScheduler"}
ONE = DDIM | {"num_train_timesteps": 1}
EULER = SD | {"_class_name": "EulerDiscreteScheduler"}
LCM = SD | {"_class_name": "LCMScheduler"}
PNDM = SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
STEPS = [1, 2, 4, 10, 25, 50]

LATENTS = np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)
NOISE = np.random.default_rng(1).standard_normal((51, *LATENTS.shape), np.float32)


def from_config(config, n, sigmas=None):
    return schedulers.from_config(SchedulerConfig.from_json(config), n, sigmas)


def from_folder(config, n):
    return schedulers.from_folder(SchedulerConfig.from_json(config), n)


def network(library, latents, timestep):
    # sin(3 x) would be as smooth, but under DDIM it is chaotic: 50 steps turn one rounding into
    # errors of the order of the image.
    return library.sin(latents + 0.01 * timestep)


def reference(config, n, eta=0.0, sigmas=None):
    """diffusers' scheduler and its latents after each step."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if sigmas is None:
        scheduler.set_timesteps(n)
    else:
        scheduler.set_timesteps(sigmas=sigmas)
    is_flow = config["_class_name"].startswith("FlowMatch")
    latents = torch.tensor(LATENTS) * float(1.0 if is_flow else scheduler.init_noise_sigma)
    trajectory = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = latents if is_flow else scheduler.scale_model_input(latents, t)
        output = network(torch, scaled, t)
        extra = {"eta": eta, "variance_noise": torch.tensor(NOISE[i])} if eta else {}
        latents = scheduler.step(output, t, latents, return_dict=False, **extra)[0]
        trajectory.append(latents.numpy())
    return scheduler, np.stack(trajectory)


def run(scheduler, eta=0.0, jit=False):
    """Our latents after each step, op by op or as one compiled scan."""
    timesteps = jnp.asarray(scheduler.timesteps, jnp.float32)
    noise = jnp.asarray(NOISE)

    def call(carry, i):
        latents, state = carry
        output = network(jnp, scheduler.scale_model_input(latents, i), timesteps[i])
        latents, state = scheduler.step(output, latents, i, state, noise[i])
        return (latents, state), latents

    scheduler = scheduler.with_eta(eta) if eta else scheduler
    latents = jnp.asarray(LATENTS) * scheduler.init_noise_sigma
    carry, calls = (latents, scheduler.init_state(latents)), len(timesteps)
    if jit:
        return np.asarray(jax.jit(lambda c: jax.lax.scan(call, c, jnp.arange(calls)))(carry)[1])
    trajectory = []
    for i in range(calls):
        carry, latents = call(carry, i)
        trajectory.append(np.asarray(latents))
    return np.stack(trajectory)


def assert_same_trajectory(config, n, eta=0.0, sigmas=None, jit=False):
    scheduler = from_config(config, n, sigmas)
    theirs, expected = reference(config, n, eta, sigmas)
    # Exact, but where timesteps are logarithms of sigmas.
    log = config.get("use_karras_sigmas") or config.get("timestep_type") == "continuous"
    np.testing.assert_allclose(scheduler.timesteps, theirs.timesteps.numpy(), 1e-6 if log else 0)
    kind = np.floating if theirs.timesteps.is_floating_point() else np.integer
    assert np.issubdtype(scheduler.timesteps.dtype, kind)
    if "FlowMatch" not in config["_class_name"]:
        assert scheduler.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)

    actual = run(scheduler, eta, jit)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    # The second term is float32's own grain where sampling starts: it matters only for Euler with
    # zero SNR, where diffusers subtracts numbers of 4096 to get latents of 1.
    grain = 4 * np.finfo(np.float32).eps * scheduler.init_noise_sigma
    # LCM in diffusers mixes up to 1e-5 of the noisy latents into x0, at each of its late steps.
    least = 5e-5 if config["_class_name"] == "LCMScheduler" else 1e-5
    for ours, wanted in zip(actual, expected, strict=True):
        assert np.abs(ours - wanted).max() <= least * np.abs(wanted).max() + grain


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("base", [DDIM, EULER, PNDM], ids=lambda base: base["_class_name"])
def test_number_of_steps(base, timestep_spacing, n):
    assert_same_trajectory(base | {"timestep_spacing": timestep_spacing}, n)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_fields(prediction_type, timestep_spacing, set_alpha_to_one, clip_sample, eta):
    for rescale_betas_zero_snr in (False, True):
        config = DDIM | {
            "prediction_type": prediction_type,
            "timestep_spacing": timestep_spacing,
            "set_alpha_to_one": set_alpha_to_one,
            "clip_sample": clip_sample,
            "clip_sample_range": 0.8,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        if (
            rescale_betas_zero_snr
            and prediction_type == "epsilon"
            and timestep_spacing != "leading"
        ):
            with pytest.raises(InputError, match="rescale_betas_zero_snr"):
                from_config(config, 4)
        else:
            assert_same_trajectory(config, 4, eta)


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_euler_fields(prediction_type, timestep_spacing, rescale_betas_zero_snr, final_sigmas_type):
    config = EULER | {
        "prediction_type": prediction_type,
        "timestep_spacing": timestep_spacing,
        "rescale_betas_zero_snr": rescale_betas_zero_snr,
        "final_sigmas_type": final_sigmas_type,
    }
    assert_same_trajectory(config, 4)


@pytest.mark.parametrize("limits", [{}, {"sigma_min": 0.1, "sigma_max": 10.0}])
@pytest.mark.parametrize("timestep_type", ["discrete", "continuous"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_euler_karras_sigmas_and_continuous_timesteps(prediction_type, timestep_type, limits):
    config = EULER | {"prediction_type": prediction_type, "timestep_type": timestep_type} | limits
    for use_karras_sigmas, n in itertools.product((False, True), (1, 10)):
        assert_same_trajectory(config | {"use_karras_sigmas": use_karras_sigmas}, n)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pndm_fields(prediction_type, timestep_spacing, set_alpha_to_one):
    config = PNDM | {
        "prediction_type": prediction_type,
        "timestep_spacing": timestep_spacing,
        "set_alpha_to_one": set_alpha_to_one,
        # Not PNDM's, and left alone by diffusers as by us.
        "clip_sample": True,
        "rescale_betas_zero_snr": True,
    }
    for n in (3, 6):
        assert_same_trajectory(config, n)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift, n):
    assert_same_trajectory(FLOW | {"shift": shift}, n)
    assert_same_trajectory(FLOW | {"shift": shift}, n, sigmas=np.linspace(1, 1 / n, n).tolist())


def test_flow_matching_on_the_grid_of_a_few_step_student():
    scheduler = from_config(REAL["sd3-medium"], 4, sigmas=[1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(scheduler.timesteps, [1000, 900, 750, 500], rtol=1e-6)


@pytest.mark.parametrize("original", [4, 50])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_lcm(monkeypatch, prediction_type, n, original):
    noise = iter(torch.tensor(NOISE))
    module = diffusers.schedulers.scheduling_lcm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noise))
    config = LCM | {"prediction_type": prediction_type, "original_inference_steps": original}
    assert_same_trajectory(config, n)


@pytest.mark.parametrize("n", [1, 4, 25])
def test_flow_matching_with_stochastic_sampling(monkeypatch, n):
    noise = iter(torch.tensor(NOISE))
    module = diffusers.schedulers.scheduling_flow_match_euler_discrete
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noise))
    assert_same_trajectory(FLOW | {"stochastic_sampling": True}, n)


@pytest.mark.parametrize("n", [1, 4, 30])
@pytest.mark.parametrize("name", REAL)
def test_real_configs(monkeypatch, name, n):
    noise = iter(torch.tensor(NOISE))
    module = diffusers.schedulers.scheduling_lcm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noise))
    if name in SUPPORTED:
        assert_same_trajectory(REAL[name], n)
    else:
        with pytest.raises(InputError, match=REAL[name]["_class_name"]):
            from_config(REAL[name], n)


@pytest.mark.parametrize(
    "config, eta",
    [
        (DDIM | {"prediction_type": "v_prediction", "clip_sample": True}, 0.6),
        (DDIM | {"prediction_type": "sample"}, 0.0),
        (EULER | {"prediction_type": "v_prediction", "use_karras_sigmas": True}, 0.0),
        (EULER | {"prediction_type": "sample"}, 0.0),
        (PNDM | {"prediction_type": "v_prediction"}, 0.0),
        (FLOW, 0.0),
    ],
)
def test_compiled(config, eta):
    assert_same_trajectory(config, 50, eta, jit=True)


@pytest.mark.parametrize("base", [DDIM, EULER, PNDM], ids=lambda base: base["_class_name"])
def test_trajectory_with_other_betas(base):
    schedule = {"trained_betas": np.linspace(0.001, 0.5, 20).tolist(), "num_train_timesteps": 20}
    assert_same_trajectory(base | schedule, 4)
    assert_same_trajectory(base | {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 0}, 5)


def test_four_trailing_steps_end_on_the_clean_image():
    config = DDIM | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler = from_config(config, 4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    latents, state = jnp.asarray(LATENTS), ()
    output = network(jnp, latents, 249)
    x0, _ = scheduler.x0_and_epsilon(output, latents, 3)
    np.testing.assert_array_equal(scheduler.step(output, latents, 3, state)[0], x0)


def test_trailing_never_visits_a_timestep_below_zero():
    # np.arange(1000, 0, -1000 / 61) has 62 points; diffusers 0.42 visits the last as timestep -1.
    timesteps = from_config(DDIM | {"timestep_spacing": "trailing"}, 61).timesteps
    assert len(timesteps) == 61 and timesteps[-1] == 15


def test_zero_snr_with_all_noise_fresh_is_finite():
    # At eta 1 the first step keeps none of the old noise: the square root of sigma^2 - sigma^2,
    # which compiled code, rounding one square and not the other, can make negative.
    config = DDIM | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    for n in (10, 13, 22, 25):
        scheduler = from_config(config | {"rescale_betas_zero_snr": True}, n)
        assert np.isfinite(run(scheduler, eta=1.0, jit=True)).all()


@pytest.mark.parametrize("config", [DDIM, EULER, PNDM, FLOW], ids=lambda c: c["_class_name"])
def test_latents_stay_float32_under_a_bfloat16_network(config):
    scheduler = from_config(config, 2)
    latents = jnp.asarray(LATENTS)
    carry = (latents, scheduler.init_state(latents))
    for i in range(len(scheduler.timesteps)):
        carry = scheduler.step(carry[0].astype(jnp.bfloat16), carry[0], i, carry[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(carry))


def test_needs_noise():
    ddim = from_config(DDIM, 4)
    half = ddim.with_eta(0.5)
    assert half.needs_noise and not ddim.needs_noise
    with pytest.raises(ValueError, match="noise"):
        half.step(jnp.asarray(LATENTS), jnp.asarray(LATENTS), 0, ())
    for config in (FLOW | {"stochastic_sampling": True}, LCM):
        scheduler = from_config(config, 4)
        assert scheduler.needs_noise and scheduler.with_eta(1).needs_noise
        with pytest.raises(InputError, match=r"eta=0 needs .* has eta 1"):
            scheduler.with_eta(0)
    for config in (EULER, PNDM, FLOW):
        scheduler = from_config(config, 4)
        assert not scheduler.needs_noise
        with pytest.raises(InputError, match=r"eta=0\.5 needs a DDIM.* has eta 0"):
            scheduler.with_eta(0.5)


@pytest.mark.parametrize(
    "base, field, value",
    [
        (DDIM, "thresholding", True),
        (DDIM, "beta_schedule", "sigmoid"),
        (DDIM, "prediction_type", "flow_prediction"),
        (DDIM, "timestep_spacing", "karras"),
        (DDIM, "trained_betas", "linear"),
        (DDIM, "beta_start", None),
        (EULER, "interpolation_type", "log_linear"),
        (EULER, "use_exponential_sigmas", True),
        (EULER, "use_beta_sigmas", True),
        (EULER, "timestep_type", "sigma"),
        (EULER, "final_sigmas_type", "one"),
        (PNDM, "skip_prk_steps", False),
        (PNDM, "prediction_type", "sample"),
        (FLOW, "use_dynamic_shifting", True),
        (FLOW, "invert_sigmas", True),
        (FLOW, "use_karras_sigmas", True),
        (FLOW, "use_exponential_sigmas", True),
        (FLOW, "use_beta_sigmas", True),
    ],
)
def test_fields_not_supported_are_named(base, field, value):
    with pytest.raises(InputError) as error:
        from_config(base | {field: value}, 4)
    message = str(error.value)
    assert base["_class_name"] in message and f"{field}={value!r}" in message
    assert "supported: " in message and "\n" not in message


@pytest.mark.parametrize(
    "arguments, match",
    [
        (({}, 4), "None is not supported; supported: DDIMScheduler, EulerDiscreteScheduler"),
        (({"_class_name": "TCDScheduler"}, 4), "'TCDScheduler' is not supported"),
        (({"_class_name": "PNDMScheduler"}, 4), "skip_prk_steps=False"),  # its default
        ((DDIM, 0), "num_inference_steps=0"),
        ((DDIM, 1001), "1000 timesteps"),
        ((LCM | {"original_inference_steps": 3}, 4), "expected 4 to 1000"),
        ((LCM | {"original_inference_steps": 1001}, 4), "expected 4 to 1000"),
        ((LCM | {"original_inference_steps": 1000}, 1000), "ends at timestep 0"),
        ((LCM | {"timestep_scaling": 1.0}, 4), "timestep_scaling=1.0 is not supported"),
        ((DDIM, 1000), "timestep 1000"),  # leading, from steps_offset 1
        ((EULER, 2, [1.0, 0.5]), "sigmas are for FlowMatch"),
        ((FLOW, 4, [1.0, 0.5]), "2 sigmas"),
        ((DDIM | {"trained_betas": [0.1]}, 4), "trained_betas has 1 values"),
        ((ONE | {"trained_betas": ["0.1"]}, 1), r"trained_betas: .* found '0\.1'"),
        ((ONE | {"trained_betas": [[0.1]]}, 1), r"trained_betas: .* found \[0\.1\]"),
        ((DDIM | {"beta_start": float("nan")}, 4), "beta_start=nan is not supported"),
        ((EULER | {"beta_end": 2.0}, 4), "beta_start and beta_end: .* from 0 to 1, found 2.0"),
        ((DDIM | {"num_train_timesteps": 0}, 1), "num_train_timesteps=0: at least 1"),
        ((FLOW | {"num_train_timesteps": -5}, 1), "num_train_timesteps=-5 is .*: at least 2"),
        (({"_class_name": ["DDIMScheduler"]}, 4), r"\['DDIMScheduler'\] is not supported"),
    ],
)
def test_arguments_not_supported_are_named(arguments, match):
    with pytest.raises(InputError, match=match):
        from_config(*arguments)


@pytest.mark.parametrize(
    "config, said",
    [
        (
            SD | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "'DPMSolverMultistepScheduler' is not supported; supported: DDIMScheduler",
        ),
        (SD | {"_class_name": "TCDScheduler", "prediction_type": "v_prediction"}, "'TCDScheduler'"),
        (EULER | {"use_beta_sigmas": True}, "EulerDiscreteScheduler with use_beta_sigmas=True"),
        (PNDM | {"skip_prk_steps": False}, "PNDMScheduler with skip_prk_steps=False"),
    ],
    ids=lambda x: x["_class_name"] if isinstance(x, dict) else "",
)
def test_a_folder_whose_sampler_is_not_here_is_sampled_by_ddim_and_told_so(config, said):
    with pytest.warns(UserWarning, match=f"^images are drawn with DDIM, not .*{said}") as told:
        found = from_folder(config, 4)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert found.timesteps.tolist() == [999, 749, 499, 249] and found.next_sigmas[-1] == 0
    assert found.prediction_type == config.get("prediction_type", "epsilon")
    assert found.with_eta(0.5).needs_noise
    # What a user would make of such a folder in diffusers.
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    ddim = diffusers.DDIMScheduler.from_config(
        theirs.config, timestep_spacing="trailing", clip_sample=False
    )
    assert_same_trajectory(dict(ddim.config) | {"_class_name": "DDIMScheduler"}, 4)
    np.testing.assert_allclose(found.alphas**2, ddim.alphas_cumprod[found.timesteps], rtol=1e-6)


@pytest.mark.parametrize("config", [DDIM, EULER, LCM, PNDM, FLOW], ids=lambda c: c["_class_name"])
def test_a_folder_is_else_sampled_by_its_own_sampler(config):
    own, found = from_config(config, 3), from_folder(config, 3)
    np.testing.assert_array_equal(found.timesteps, own.timesteps)
    np.testing.assert_array_equal(found.next_sigmas, own.next_sigmas)


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            "prediction_type='flow_prediction'",
        ),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "'CogVideoXDDIMScheduler' has no betas"),
        (FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({}, "None has no betas"),
    ],
)
def test_a_folder_whose_noise_is_unknown_is_an_error(config, said):
    with pytest.raises(InputError, match=said):
        from_folder(config, 4)
    with pytest.raises(InputError, match="num_inference_steps=0"):
        from_folder(DDIM, 0)
