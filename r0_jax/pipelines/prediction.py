"""What a single-file checkpoint says about its noise, and the scheduler that follows from it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.files import read_json

_SAID = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}


class Prediction(NamedTuple):
    """What the network predicts; None where the file does not say. Is the last SNR zero?"""

    type: str | None
    zero_snr: bool


def find(keys: Iterable[str], metadata: Mapping[str, str], path: Path) -> Prediction:
    """Return what marker tensors say, or the metadata where there are none.

    Raise InputError for EDM, and for a type of prediction that is not known.
    """
    keys = set(keys)
    if edm := min((key for key in keys if key.startswith("edm_")), default=None):
        raise InputError(f"{path} is trained with EDM's noise ({edm}), which is not supported")
    zero_snr = "ztsnr" in keys or metadata.get("ss_zero_terminal_snr") == "True"
    said = metadata.get("modelspec.prediction_type")
    if "v_pred" in keys or zero_snr:  # a network cannot predict epsilon where there is no signal
        return Prediction("v_prediction", zero_snr)
    if said:
        if said.lower() not in _SAID:
            raise InputError(
                f"{path} says modelspec.prediction_type={said!r}, which is not supported; "
                "supported: epsilon, v"
            )
        return Prediction(_SAID[said.lower()], False)
    is_v = metadata.get("ss_v_parameterization") == "True"
    return Prediction("v_prediction" if is_v else None, False)


def apply(prediction: Prediction, folder: Path, path: Path) -> None:
    """Change the scheduler's config in a diffusers folder to what the checkpoint `path` says."""
    config, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    before = read_json(config)
    changes: dict[str, Any] = {}
    if prediction.type:
        changes["prediction_type"] = prediction.type
    if prediction.zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    differs = {x: v for x, v in changes.items() if before.get(x, defaults.get(x)) != v}
    if not differs:
        return
    after = before | changes
    parsed = SchedulerConfig.from_json(after)
    if prediction.zero_snr and not getattr(parsed.noise, "rescale_betas_zero_snr", False):
        # The class, such as PNDM, has no such field.
        after = parsed.trailing_ddim().fields | changes
        pipeline = read_json(index)
        pipeline["scheduler"] = ["diffusers", after["_class_name"]]
        index.write_text(json.dumps(pipeline), "utf-8")
    config.write_text(json.dumps(after), "utf-8")
    logging.warning(
        "%s says %s, --config does not: the file wins",
        path,
        ", ".join(f"{name}={value}" for name, value in differs.items()),
    )
