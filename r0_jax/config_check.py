"""Checks a config before anything is loaded."""

import difflib
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.method.directions import CONSISTENCY_FORMS, GUIDANCE_FORMS, SCORE_FORMS, TARGETS
from r0_jax.method.regularizers import DIRECTIONS
from r0_jax.method.reward_gradient import CONFLICTS, NORMALIZATIONS
from r0_jax.method.reward_step import METHODS
from r0_jax.models import attention_backend
from r0_jax.pipelines import families

REMATS = ("blocks", "calls", "none")
MOST_STEPS = 50  # of a sampler in training
# Field -> (least, most) value; other checks cover the other fields.
RANGES = {
    "seed": (0, 2**32 - 1),
    "steps": (1, math.inf),
    "log_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "eval_every": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "early_stop": (0, math.inf),
    "profile": (0, math.inf),
    "draw_batch": (0, math.inf),
    "height": (0, math.inf),
    "width": (0, math.inf),
    "max_skipped_in_a_row": (1, math.inf),
    "ema_decay": (0, 1),
    "sampler.num_steps": (1, MOST_STEPS),
    "sampler.guidance_scale": (1, base.MOST_GUIDANCE),
    "objective.late_steps": (1, math.inf),
    "objective.noises": (0, math.inf),
    "objective.bound": (0, math.inf),
    "eval.num_prompts": (1, math.inf),
    "eval.grid": (1, math.inf),
    "lora.rank": (0, math.inf),
    "lora.alpha": (0, math.inf),
    "objective.delta": (0, math.inf),
    "objective.sharpness": (0, math.inf),
    "regularizers.gradient.weight": (0, 1),
    "regularizers.gradient.samples": (1, math.inf),
    "regularizers.gradient.std": (0, math.inf),
    "regularizers.feature.least": (0, 1),
    "regularizers.feature.most": (0, 1),
    "regularizers.guidance.least": (0, 1),
    "regularizers.guidance.most": (0, 1),
    "regularizers.guidance.scale": (0, base.MOST_GUIDANCE),
    "regularizers.output.scale": (0, base.MOST_GUIDANCE),
    "test.guidance_scale": (0, base.MOST_GUIDANCE),
    "regularizers.consistency.least": (0, base.MOST_GUIDANCE),
    "regularizers.consistency.most": (0, base.MOST_GUIDANCE),
    "regularizers.consistency.skip": (0.001, 1),
    "regularizers.consistency.c": (1e-8, math.inf),  # at 0 the gradient of no distance is 0 / 0
    "regularizers.score.scale": (0, base.MOST_GUIDANCE),
    "regularizers.score.least": (0, 1),
    "regularizers.score.most": (0, 1),
    "regularizers.score.rank": (1, math.inf),
    "regularizers.score.updates": (1, math.inf),
    "regularizers.score.learning_rate_ratio": (0, math.inf),
    "regularizers.score.b1": (0, 0.9999),
    "processes.start_timeout": (1, math.inf),
    "processes.lost_timeout": (1, math.inf),
    "processes.hang_timeout": (1, math.inf),
}


def check_config(config: ConfigDict, device: Any = None) -> None:
    """Check values that no later check covers; raise InputError.

    The config is for a run on `device`, by default on this machine.
    """
    check_fields(config)
    ranges = RANGES | {
        f"regularizers.{name}.weight": (0, math.inf)
        for name in config.regularizers
        if name != "gradient"
    }
    for field, (least, most) in ranges.items():
        value = _at(config, field)
        if not (least <= value <= most and value < math.inf):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise InputError(f"{field}={value} must be {bound}")
    for field, value in named_fields(config.to_dict()):
        # An infinite clip_norm means no clipping; method/optim.py checks it.
        if isinstance(value, float) and not math.isfinite(value) and field != "optimizer.clip_norm":
            raise InputError(f"{field}={value} must be a finite number")
    if config.remat not in REMATS:
        raise InputError(f"remat={config.remat!r} is unknown; use {', '.join(map(repr, REMATS))}")
    for field, value, known in (
        ("objective.method", config.objective.method, METHODS),
        ("objective.normalization", config.objective.normalization, NORMALIZATIONS),
        ("objective.conflicts", config.objective.conflicts, CONFLICTS),
        ("regularizers.guidance.form", config.regularizers.guidance.form, GUIDANCE_FORMS),
        ("regularizers.consistency.form", config.regularizers.consistency.form, CONSISTENCY_FORMS),
        ("regularizers.consistency.target", config.regularizers.consistency.target, TARGETS),
        ("regularizers.score.form", config.regularizers.score.form, SCORE_FORMS),
    ):
        if value not in known:
            raise InputError(f"{field}={value!r} is unknown; use {' or '.join(map(repr, known))}")
    if config.sampler.eta not in (0, 1):
        raise InputError(
            f"sampler.eta={config.sampler.eta:g} must be 0 or 1: stock samplers draw no other "
            "share of the noise anew; set sampler.random_eta to train with all shares"
        )
    for name in ("feature", "guidance", "consistency", "score"):
        least, most = config.regularizers[name].least, config.regularizers[name].most
        if least > most:
            raise InputError(
                f"regularizers.{name}.least={least:g} is above regularizers.{name}.most={most:g}"
            )
    _check_steps(config.objective, config.sampler.num_steps)
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype={config.dtype!r} is not supported; use 'float32' or 'bfloat16'")
    attention_backend.check(config.attention, config.dtype, device)
    families.check_there(config.pretrained, config.family)
    if not (config.data.prompts or config.data.encoded):
        raise InputError("data.prompts is not set: give --config.data.prompts=PATH")
    trained = base.trained_rewards(config)
    pulling = [name for name in DIRECTIONS if config.regularizers[name].weight]
    if not (trained or pulling):
        raise InputError(
            "no reward has a weight and no regularizer pulls at x0: there is nothing to train; "
            f"add a reward, or give one of {', '.join(DIRECTIONS)} a weight"
        )
    if both := set(config.rewards) & set(config.heldout_rewards):
        raise InputError(f"{min(both)} is the name of a reward and of a held-out one: rename one")
    measured = [f"eval/{name}" for name in trained]
    measured += [f"heldout/{name}" for name in config.heldout_rewards]
    if config.best_metric and config.best_metric not in measured:
        raise InputError(
            f"best_metric={config.best_metric!r} is not measured; use one of "
            f"{', '.join(measured) or 'none'}, or '' for no best checkpoint"
        )
    if config.early_stop and not config.best_metric:
        raise InputError(
            f"early_stop={config.early_stop} needs best_metric; "
            f"set it to one of {', '.join(measured)}"
        )
    if not (pulling or config.regularizers.weight.weight):
        warnings.warn(
            "no regularizer keeps the generator near its pretrained self: rewards alone make it "
            f"collapse; give one of weight, {', '.join(DIRECTIONS)} a weight",
            stacklevel=2,
        )
    if useless := without_effect(config):
        warnings.warn(f"no effect: {'; '.join(useless)}", stacklevel=2)


def _check_steps(objective: ConfigDict, num_steps: int) -> None:
    """Check which steps are rewarded and carry a gradient, of `num_steps`; raise InputError."""
    method, grad_steps, late = objective.method, objective.grad_steps, objective.late_steps
    steps = f"sampler.num_steps={num_steps}"
    if method in ("refl", "drtune") and late > num_steps:
        raise InputError(f"objective.late_steps={late} must be at most {steps}")
    if method == "r0" and not 1 <= grad_steps <= num_steps:
        raise InputError(f"objective.grad_steps={grad_steps} must be between 1 and {steps}")
    if method == "drtune" and not 1 <= grad_steps <= (most := num_steps - late + 1):
        raise InputError(
            f"objective.grad_steps={grad_steps} must be between 1 and {most}: with {steps} and "
            f"objective.late_steps={late} no more steps may come before the rewarded one"
        )
    if objective.noises and (method != "r0" or grad_steps != 1):
        raise InputError(
            f"objective.noises={objective.noises} needs objective.method='r0' and "
            "objective.grad_steps=1: only the last step is made again"
        )


# Field of a reward's entry -> the types that it means something to.
_READ_BY = {
    "size": ("hps_v3", "vlm_yes_no"),
    "tokens": ("hps_v3", "vlm_yes_no"),
    "language": ("vlm_yes_no",),
    "questions": ("vlm_yes_no",),
}


def without_effect(config: ConfigDict) -> list[str]:
    """Return what is set, to other than its default, and changes nothing: one text a reason."""
    objective, terms, usual = config.objective, config.regularizers, base.get_config()
    guided = "regularizers.output.scale", "regularizers.output.guided is false"
    direction = "regularizers.guidance.scale", "regularizers.guidance.form is direction"
    unused: list[tuple[str, str]] = []  # (field, the reason)
    if objective.method in ("r0plus", "refl"):
        unused.append(("objective.grad_steps", f"objective.method is {objective.method}"))
    if objective.method != "r0":
        unused.append(("objective.bound", f"objective.method is {objective.method}"))
    if objective.method in ("r0", "r0plus"):
        unused.append(("objective.late_steps", f"objective.method is {objective.method}"))
    if objective.normalization == "none":
        unused.append(("objective.delta", "objective.normalization is none"))
    if config.lora.rank == 0:
        unused.append(("lora.alpha", "lora.rank is 0"))
        if not terms.score.weight or terms.score.targets:  # the fake score's may be the same
            unused.append(("lora.targets", "lora.rank is 0"))
    if terms.output.weight and not terms.output.guided:
        unused.append(guided)
    if terms.guidance.weight and terms.guidance.form == "direction":
        unused.append(direction)
    if terms.consistency.weight and terms.consistency.form == "l2":
        unused.append(("regularizers.consistency.c", "regularizers.consistency.form is l2"))
    unused += [
        (f"regularizers.{name}.{field}", f"regularizers.{name}.weight is 0")
        for name, term in terms.items()
        for field in term
        if not term.weight and field != "weight"
    ]
    changed: dict[str, list[str]] = {}
    for field, reason in unused:
        if _at(config, field) != _at(usual, field):
            changed.setdefault(reason, []).append(field)
    for name, entry in config.rewards.items():
        if not entry.weight:
            changed.setdefault("its weight is 0", []).append(f"rewards.{name}")
    default = base.reward_entry(type="")
    for section in ("rewards", "heldout_rewards"):
        for name, entry in config[section].items():
            for field, types in _READ_BY.items():
                if entry.type not in types and entry[field] != default[field]:
                    reason = f"its type is {entry.type}"
                    changed.setdefault(reason, []).append(f"{section}.{name}.{field}")
    return [f"{', '.join(fields)}, as {reason}" for reason, fields in changed.items()]


def _at(config: ConfigDict, field: str) -> Any:
    return functools.reduce(lambda part, name: part[name], field.split("."), config)


def check_fields(config: ConfigDict) -> None:
    """Check that a config and its rewards have exactly the known fields; raise InputError."""
    try:
        there = [name for name, _ in named_fields(config.to_dict())]
    except RecursionError:
        raise InputError("the config holds itself: give each section its own ConfigDict") from None
    known = [name for name, _ in named_fields(base.get_config().to_dict())]
    if missing := [name for name in known if name not in there]:
        raise InputError(
            f"the config lacks the field {missing[0]}: start with "
            "config = r0_jax.config.get_config(), as the recipes in configs/ do"
        )
    # A recipe unlocks its config to add rewards, so a mistyped field raises no error there.
    for name in there:
        if name not in known and name.split(".")[0] not in ("rewards", "heldout_rewards", "veto"):
            near = "".join(difflib.get_close_matches(name, known, n=1))
            raise InputError(
                f"the config has an unknown field, {name}"
                + (f"; did you mean {near}?" if near else "")
            )
    usual = dict(named_fields(base.get_config().to_dict()))
    for name, value in named_fields(config.to_dict()):
        if name in usual and not _same_kind(value, usual[name]):
            kind = "section" if isinstance(usual[name], dict) else type(usual[name]).__name__
            raise InputError(f"{name}={_shortly(value)} must be of type {kind}")
    for section in ("rewards", "heldout_rewards"):
        for name, entry in config[section].items():
            check_reward(f"{section}.{name}", entry)


def _same_kind(value: Any, usual: Any) -> bool:
    if usual is None:
        return True
    if isinstance(usual, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(usual, bool)
    if isinstance(usual, tuple | list):
        return isinstance(value, tuple | list)
    return isinstance(value, int | float if isinstance(usual, float) else type(usual))


def _shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_reward(name: str, entry: Any) -> None:
    """Check fields and types of an entry of `config.reward_entry`; raise InputError."""
    expected = base.reward_entry(type="").to_dict()
    fields = entry.to_dict() if isinstance(entry, ConfigDict) else {}
    if different := set(fields) ^ set(expected):
        raise InputError(
            f"{name} has an unknown or missing field, {min(different)}: "
            "make it with r0_jax.config.reward_entry(...)"
        )
    for field, default in expected.items():
        kind, value = type(default), fields[field]
        if not (isinstance(value, kind) or (kind is float and type(value) is int)):
            raise InputError(f"{name}.{field}={value!r} must be of type {kind.__name__}")
    for field in ("weight", "cap"):
        if not math.isfinite(fields[field]):
            raise InputError(f"{name}.{field}={fields[field]} must be finite")


def named_fields(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all fields of a nested dict, dicts included, with dotted names."""
    for name, value in fields.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from named_fields(value, f"{prefix}{name}.")
