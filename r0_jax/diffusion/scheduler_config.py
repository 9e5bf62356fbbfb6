"""A folder's scheduler_config.json, parsed once.

The file says what noise the network was trained with, and how the folder's own sampler draws.
Training asks for the noise alone, so it supports more classes of diffusers than drawing does.
A folder opens whatever its scheduler is. Only the use of a part that is not supported is an error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import UnionType
from typing import TypedDict, TypeVar, cast

from r0_jax.diffusion.noise_schedule import FlowMatching, NoiseSchedule, VariancePreserving
from r0_jax.errors import InputError
from r0_jax.files import Json

FLOW_MATCHING = "FlowMatchEulerDiscreteScheduler"

# Field of scheduler_config.json -> (default of the diffusers class, what we support). What we
# support is a tuple of values, or a type. Files hold fields of other classes too (SD 1.5's PNDM
# file has `clip_sample`); diffusers does not read those and neither do we.
_Known = dict[str, tuple[object, tuple[object, ...] | type | UnionType]]
_NUMBER = int | float
_MOST = 10**9  # of any number
# Tables have an entry a timestep; published networks have 1,000.
_BOUNDS = {
    "num_train_timesteps": (-_MOST, 100_000),
    "original_inference_steps": (1, 100_000),
}

# Class -> the fields that define its noise. All schedulers of diffusers for variance-preserving
# networks share them, however they sample.
_BETAS: _Known = {
    "num_train_timesteps": (1000, int),
    "beta_start": (0.0001, _NUMBER),
    "beta_end": (0.02, _NUMBER),
    "beta_schedule": ("linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": (None, list | tuple | None),
    "prediction_type": ("epsilon", ("epsilon", "v_prediction", "sample")),
}
_RESCALED = _BETAS | {"rescale_betas_zero_snr": (False, (False, True))}
# These classes can sample flow matching too, which has no betas.
_NO_FLOW: _Known = {"use_flow_sigmas": (False, (False, None))}
_STABLE_DIFFUSION: _Known = {"beta_start": (0.00085, _NUMBER), "beta_end": (0.012, _NUMBER)}
_SCALED_LINEAR: _Known = {"beta_schedule": ("scaled_linear", _BETAS["beta_schedule"][1])}
_NOISE: dict[str, _Known] = {
    "DDIMScheduler": _RESCALED,
    "DDPMScheduler": _RESCALED,
    "DEISMultistepScheduler": _BETAS | _NO_FLOW,
    "DPMSolverMultistepScheduler": _RESCALED | _NO_FLOW,
    "DPMSolverSinglestepScheduler": _BETAS | _NO_FLOW,
    "EulerAncestralDiscreteScheduler": _RESCALED,
    "EulerDiscreteScheduler": _RESCALED,
    "HeunDiscreteScheduler": _BETAS | _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _BETAS | _STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": _BETAS | _STABLE_DIFFUSION,
    "LCMScheduler": _RESCALED | _STABLE_DIFFUSION | _SCALED_LINEAR,
    "LMSDiscreteScheduler": _BETAS,
    "PNDMScheduler": _BETAS,
    "TCDScheduler": _RESCALED | _STABLE_DIFFUSION | _SCALED_LINEAR,
    "UniPCMultistepScheduler": _RESCALED | _NO_FLOW,
}
SCHEDULERS = (*_NOISE, FLOW_MATCHING)  # classes whose noise is known

# Class -> the fields that define how it samples, for the samplers of schedulers.py.
_SPACED: _Known = {
    "timestep_spacing": ("leading", ("leading", "trailing", "linspace")),
    "steps_offset": (0, int),
}
_SAMPLING: dict[str, _Known] = {
    "DDIMScheduler": _SPACED
    | {
        "set_alpha_to_one": (True, (False, True)),
        "clip_sample": (True, (False, True)),
        "clip_sample_range": (1.0, _NUMBER),
        "thresholding": (False, (False,)),
    },
    "EulerDiscreteScheduler": _SPACED
    | {
        "timestep_spacing": ("linspace", ("leading", "trailing", "linspace")),
        "timestep_type": ("discrete", ("discrete", "continuous")),
        "interpolation_type": ("linear", ("linear",)),
        "use_karras_sigmas": (False, (False, True, None)),
        "use_exponential_sigmas": (False, (False, None)),
        "use_beta_sigmas": (False, (False, None)),
        "sigma_min": (None, _NUMBER | None),
        "sigma_max": (None, _NUMBER | None),
        "final_sigmas_type": ("zero", ("zero", "sigma_min")),
    },
    "LCMScheduler": {
        "original_inference_steps": (50, int),
        "clip_sample": (False, (False, True)),
        "clip_sample_range": (1.0, _NUMBER),
        "thresholding": (False, (False,)),
        "timestep_scaling": (10.0, (10.0,)),
    },
    "PNDMScheduler": _SPACED
    | {
        "prediction_type": ("epsilon", ("epsilon", "v_prediction")),
        "set_alpha_to_one": (False, (False, True)),
        "skip_prk_steps": (False, (True,)),
    },
    FLOW_MATCHING: {
        "num_train_timesteps": (1000, int),
        "shift": (1.0, _NUMBER),
        "stochastic_sampling": (False, (False, True)),
        "shift_terminal": (None, _NUMBER | None),
        "use_dynamic_shifting": (False, (False,)),
        "invert_sigmas": (False, (False,)),
        "use_karras_sigmas": (False, (False,)),
        "use_exponential_sigmas": (False, (False,)),
        "use_beta_sigmas": (False, (False,)),
    },
}


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """The reason why a part of the file is not supported, in place of that part."""

    problem: str


class Fields(TypedDict, total=False):
    """Fields of a class that were checked, defaults filled in. Each class has some of them."""

    num_train_timesteps: int
    # Of the noise.
    beta_start: float | int
    beta_end: float | int
    beta_schedule: str
    trained_betas: list | tuple | None
    prediction_type: str
    rescale_betas_zero_snr: bool
    # Of the sampling.
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    clip_sample: bool
    clip_sample_range: float | int
    original_inference_steps: int
    timestep_type: str
    use_karras_sigmas: bool | None
    sigma_min: float | int | None
    sigma_max: float | int | None
    final_sigmas_type: str
    shift: float | int
    shift_terminal: float | int | None
    stochastic_sampling: bool


_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, eq=False)
class SchedulerConfig:
    """A scheduler of diffusers: the noise of training, and how it samples.

    Attributes:
      class_name: in diffusers.
      fields: the contents of the file; an export writes them.
      trained: the noise of training; `noise` returns it or raises.
      sampled: how the class samples; `sampling` returns it or raises.
      even_sigmas: the stock pipeline gives the scheduler sigmas 1, ..., 1 / n. Other ones leave
        flow matching to diffusers, whose sigmas end near 0.
    """

    class_name: str
    fields: Json
    trained: NoiseSchedule | Unsupported
    sampled: Fields | Unsupported
    even_sigmas: bool = False

    @classmethod
    def from_json(
        cls, fields: Mapping[str, object], where: str = "", even_sigmas: bool = False
    ) -> "SchedulerConfig":
        """Parse the contents of a scheduler_config.json; messages begin with `where`."""
        name = fields.get("_class_name")
        noise = _flow_noise if name == FLOW_MATCHING else _betas
        return cls(
            str(name),
            dict(fields),
            _attempt(noise, fields, where),
            _attempt(_sampling, fields, where),
            even_sigmas,
        )

    @property
    def is_flow(self) -> bool:
        """Return True where the network was trained by flow matching."""
        return self.class_name == FLOW_MATCHING

    @property
    def noise(self) -> NoiseSchedule:
        """Return the noise of training; InputError names the class or field not supported."""
        if isinstance(self.trained, Unsupported):
            raise InputError(self.trained.problem)
        return self.trained

    @property
    def sampling(self) -> Fields:
        """Return the fields by which the class samples; InputError names what is not supported."""
        if isinstance(self.sampled, Unsupported):
            raise InputError(self.sampled.problem)
        return self.sampled

    def trailing_ddim(self) -> "SchedulerConfig":
        """Return DDIM on the same noise: trailing timesteps, and the clean image at the end.

        Raises:
          InputError: the noise is not supported.
        """
        return SchedulerConfig.from_json(
            {
                "_class_name": "DDIMScheduler",
                **dataclasses.asdict(self.noise),
                "clip_sample": False,
                "set_alpha_to_one": True,
                "steps_offset": 1,
                "thresholding": False,
                "timestep_spacing": "trailing",
            }
        )

    def lcm(self, num_steps: int) -> "SchedulerConfig":
        """Return LCM on the same noise: at most `num_steps` steps, which draw all noise anew.

        Raises:
          InputError: the noise is not supported.
        """
        return SchedulerConfig.from_json(
            {
                "_class_name": "LCMScheduler",
                **dataclasses.asdict(self.noise),
                "original_inference_steps": num_steps,
                "steps_offset": 1,  # not read, but stock Stable Diffusion warns of 0
                "clip_sample": False,
                "thresholding": False,
            }
        )


def _attempt(
    parse: Callable[[Mapping[str, object]], _T], fields: Mapping[str, object], where: str
) -> _T | Unsupported:
    try:
        return parse(fields)
    except InputError as error:
        return Unsupported(f"{where}{error}")


def _betas(fields: Mapping[str, object]) -> VariancePreserving:
    name = fields.get("_class_name")
    if not isinstance(name, str) or name not in _NOISE:
        raise InputError(
            f"scheduler {name!r} has no betas that are known; known: {', '.join(_NOISE)}"
        )
    read = _read(fields, _NOISE[name])
    if read["num_train_timesteps"] < 1:
        raise InputError(
            f"{name} with num_train_timesteps={read['num_train_timesteps']}: at least 1 is expected"
        )
    return VariancePreserving(
        read["num_train_timesteps"],
        read["beta_start"],
        read["beta_end"],
        read["beta_schedule"],
        read["trained_betas"],
        read["prediction_type"],
        read.get("rescale_betas_zero_snr", False),
    )


def _sampling(fields: Mapping[str, object]) -> Fields:
    name = fields.get("_class_name")
    if not isinstance(name, str) or name not in _SAMPLING:
        raise InputError(f"scheduler {name!r} is not supported; supported: {', '.join(_SAMPLING)}")
    if name == FLOW_MATCHING:
        return _flow_fields(fields)
    _betas(fields)  # a sampler of unknown noise is not supported either
    return _read(fields, _SAMPLING[name])


def _read(fields: Mapping[str, object], supported: _Known) -> Fields:
    """Return these fields, defaults filled in; InputError names one not supported."""
    name = fields["_class_name"]
    read = {field: fields.get(field, default) for field, (default, _) in supported.items()}
    for field, value in read.items():
        values = supported[field][1]
        if isinstance(values, tuple):
            fine, known = value in values, ", ".join(map(repr, values))
        else:
            fine, known = isinstance(value, values), str(values)
        is_checked = isinstance(value, bool) or field.startswith("shift")  # by `_flow_fields`
        if fine and isinstance(value, int | float) and not is_checked:
            least, most = _BOUNDS.get(field, (-_MOST, _MOST))
            fine = least <= value <= most  # no NaN
            known = f"at most {most}" if value > most else f"numbers from {least} to {most}"
        if not fine:
            shown = repr(value) if not isinstance(value, int) or abs(value) < 1e300 else "too large"
            raise InputError(f"{name} with {field}={shown} is not supported; supported: {known}")
    return cast(Fields, read)  # each value was checked


def _flow_fields(fields: Mapping[str, object]) -> Fields:
    read = _read(fields, _SAMPLING[FLOW_MATCHING])
    total, shift, terminal = read["num_train_timesteps"], read["shift"], read["shift_terminal"]
    for name, value, fine, expected in (  # NaN is not fine
        ("num_train_timesteps", total, total >= 2, "at least 2 is"),
        ("shift", shift, 1e-3 <= shift <= 1e3, "a number from 0.001 to 1000 is"),
        (
            "shift_terminal",
            terminal,
            terminal is None or 0 <= terminal < 1,
            "null, or a number from 0 to below 1, is",
        ),
    ):
        if not fine:
            raise InputError(
                f"{FLOW_MATCHING} with {name}={value!r} is not supported: {expected} expected"
            )
    return read


def _flow_noise(fields: Mapping[str, object]) -> FlowMatching:
    read = _flow_fields(fields)
    return FlowMatching(read["num_train_timesteps"], _trained_shift(read))


def _trained_shift(read: Fields) -> float:
    """Return the shift of training.

    An export of ours holds another shift and a terminal, which `grid.exported` computes from it.
    This function solves them for it.
    """
    found, last = read["shift"], read["shift_terminal"]
    if not last:
        return float(found)
    least = 1 / read["num_train_timesteps"]
    least = found * least / (1 + (found - 1) * least)
    share, a = (found - 1) * (1 - least) / found, (1 - last) / last
    true = (share + a) / (a * (1 - share))
    if not 1e-3 <= true <= 1e3:
        raise InputError(
            f"{FLOW_MATCHING} with shift={found} and shift_terminal={last} is not "
            "supported: no shift alone makes such sigmas; set shift_terminal to null"
        )
    return true
