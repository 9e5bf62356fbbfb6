"""What is tried of a family: each client with each format that it reads.

The result of a check lies in CLIENT_WHAT_FORMAT.json, so that a killed command continues where it
was.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.clients import comfyui_server, material
from benchmarks.clients.setting import FAMILIES, Places
from benchmarks.fullsize.watch import Window, never, watch
from r0_jax.errors import InputError
from r0_jax.export.model_card import PROMPT
from r0_jax.files import read_json, write_bytes
from r0_jax.weights.tensor_file import TensorFile

CLOSE = 1e-6  # what a weight may differ by
CLOSE_COLOR = 2  # of 255
_PROGRAMS = Path(__file__).with_name("programs")
_STEPS = 4
_CLIP_TOKENS = 77

Result = dict[str, Any]


class Client(NamedTuple):
    """A program that is tried.

    Attributes:
      folder: its checkout; None for a package.
      python: the interpreter that has what it needs.
    """

    folder: Path | None
    python: str


OURS = Client(None, sys.executable)  # stock diffusers is in this environment


class Check(NamedTuple):
    """One client with one format of a family; `what` is "weights" or "image"."""

    family: str
    client: str
    what: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.client}_{self.what}_{self.form}"


def all_of(family: str) -> list[Check]:
    """Return the checks of a family, in order."""
    forms = FAMILIES[family].formats
    found = [Check(family, "diffusers", "weights", form) for form in forms]
    adapters = "kohya" if "kohya" in forms else "peft"  # that ComfyUI reads
    for form in (adapters, "diffusers"):
        found += [Check(family, "comfyui", what, form) for what in ("weights", "image")]
    if adapters == "kohya":
        found += [Check(family, name, "weights", "kohya") for name in ("sd_scripts", "forge")]
        found.append(Check(family, "sdcpp", "image", "kohya"))
    return found


def result(check: Check, at: Places) -> Result | None:
    """Return what a check found, if it was done."""
    path = at.folder / f"{check.name}.json"
    return read_json(path) if path.is_file() else None


def is_good(found: Result) -> bool:
    """Return whether a client took all of an export, and made of it what it should."""
    return (
        "failure" not in found
        and not (found.get("ignored") or found.get("absent"))
        and found.get("error", 0) <= CLOSE
        and found.get("color_error", 0) <= CLOSE_COLOR
    )


def run(check: Check, client: Client, at: Places) -> Result:
    """Do a check and write its result, also that of a client that fails."""
    try:
        found = _RUNS[check.client, check.what](check, client, at)
    except InputError as error:
        found = {"failure": _reason(str(error))}
    found["commit"] = _commit(client.folder)
    write_bytes(at.folder / f"{check.name}.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def _reason(error: str) -> str:
    """Return the line of an error that says why: of a program, its last exception and status."""
    lines = [line for line in error.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    status = re.search(r"ended with status (-?\d+)", lines[0])
    return (f"status {status[1]}: " if status else "") + (raised or lines)[-1]


def _commit(folder: Path | None) -> str:
    """Return the commit of a checkout; "" if it is none."""
    if folder is None:
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# --- the checks -----------------------------------------------------------------------------------


def _diffusers(check: Check, client: Client, at: Places) -> Result:
    image = at.image(check.name)
    found = _program("in_diffusers.py", client, _drawn(check, at, image, ""), at)
    return found | {"deviation": float(_pixels(image).std())}


def _comfyui_weights(check: Check, client: Client, at: Places) -> Result:
    return _program("in_comfyui.py", client, _given(check, client, at), at)


def _comfyui_image(check: Check, client: Client, at: Places) -> Result:
    """Draw with ComfyUI, and with stock diffusers from the same noise and tokens."""
    assert client.folder is not None
    image, stock = at.image(check.name), at.image(f"{check.name}_stock")
    found = comfyui_server.draw(
        client.folder, client.python, FAMILIES[check.family], check.form, at, image
    )
    tokenizer = client.folder / "comfy" / "sd1_tokenizer"
    drawn = _drawn(check, at, stock, str(tokenizer))
    if check.family == "sd3":
        drawn["first_tokens"] = _CLIP_TOKENS
    _program("in_diffusers.py", OURS, drawn, at)
    return found | _compared(image, stock)


def _sd_scripts(check: Check, client: Client, at: Places) -> Result:
    return _program("in_sd_scripts.py", client, _given(check, client, at), at)


def _forge(check: Check, client: Client, at: Places) -> Result:
    return _program("in_forge.py", client, _given(check, client, at), at)


def _sdcpp(check: Check, client: Client, at: Places) -> Result:
    """Draw with stable-diffusion.cpp, and with stock diffusers from the same noise.

    The prompt is empty, since their tokenizers differ.
    """
    image, stock = at.image(check.name), at.image(f"{check.name}_stock")
    drawn = _drawn(check, at, stock, "") | {"prompt": ""}
    graph = read_json(at.export(check.form) / "comfyui_workflow.json")
    (sigmas,) = (node for node in graph["nodes"] if node["type"] == "ManualSigmas")
    given = drawn | {"image": str(image), "sigmas": sigmas["widgets_values"][0]}
    found = _program("in_sdcpp.py", client, given, at)
    _program("in_diffusers.py", OURS, drawn, at)
    keys = len(TensorFile(Path(str(given["file"]))).tensors)
    return found | {"keys": keys} | _compared(image, stock)


_RUNS: dict[tuple[str, str], Callable[[Check, Client, Places], Result]] = {
    ("diffusers", "weights"): _diffusers,
    ("comfyui", "weights"): _comfyui_weights,
    ("comfyui", "image"): _comfyui_image,
    ("sd_scripts", "weights"): _sd_scripts,
    ("forge", "weights"): _forge,
    ("sdcpp", "image"): _sdcpp,
}


def _given(check: Check, client: Client, at: Places) -> dict[str, object]:
    """Return what every program is told."""
    part = FAMILIES[check.family].part
    (base,) = (at.pipeline / part).glob("*.safetensors")
    return {
        "client": str(client.folder),
        "family": check.family,
        "form": check.form,
        "part": part,
        "base": str(base),
        "single": str(at.single),
        "adapters": str(at.adapters),
        "export": str(at.export(check.form)),
        "file": str(at.exported_file(check.form, part)),
    }


def _drawn(check: Check, at: Places, image: Path, tokenizer: str) -> dict[str, object]:
    """Return what in_diffusers.py is told; `tokenizer` replaces those of the pipeline."""
    whole = check.form == "diffusers"
    absent = ("text_encoder_3", "tokenizer_3") if check.family == "sd3" else ()
    optional = ("safety_checker", "feature_extractor") if check.family == "sd15" else ()
    options: dict[str, object] = dict.fromkeys(absent if whole else (*absent, *optional))
    given = _given(check, OURS, at)
    if not whole and ".fp16." in str(given["base"]):
        options["variant"] = "fp16"
    vae = read_json(at.pipeline / "vae" / "config.json")
    side = material.SIZE // 2 ** (len(vae["block_out_channels"]) - 1)
    return given | {
        "pipeline": str(at.export("diffusers") if whole else at.pipeline),
        "options": options,
        "tokenizer": tokenizer,
        "tokenizers": ["tokenizer"] if check.family == "sd15" else ["tokenizer", "tokenizer_2"],
        "noise_shape": [1, vae["latent_channels"], side, side],
        "seed": 0,  # as in the workflows
        "prompt": PROMPT,
        "first_tokens": 0,
        "size": material.SIZE,
        "steps": _STEPS,
        "image": str(image),
    }


def _program(name: str, client: Client, given: dict[str, object], at: Places) -> Result:
    """Run a program of this package in the client's Python; return the object that it prints."""
    start = at.log.stat().st_size if at.log.is_file() else 0
    command = [client.python, str(_PROGRAMS / name), json.dumps(given)]
    windows = watch(command, at.log, [Window("run", never)])
    said = at.log.read_bytes()[start:].decode("utf-8", "replace")
    return json.loads(said.splitlines()[-1]) | {"windows": windows}


def _compared(image: Path, stock: Path) -> Result:
    theirs = _pixels(image)
    return {
        "color_error": float(np.abs(theirs - _pixels(stock)).max()),
        "deviation": float(theirs.std()),
    }


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.float32)
