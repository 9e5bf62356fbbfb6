"""ComfyUI's server: started on a folder of links, given a workflow, asked for its image."""

import json
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.clients import api_prompt
from benchmarks.clients.setting import Family, Places
from benchmarks.fullsize.watch import Window, watch
from r0_jax.errors import InputError
from r0_jax.files import read_json

_WAIT = 30  # seconds for an answer
# Folder of ComfyUI's models/ -> what the note in the workflow says to put there.
_FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras")
_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def draw(
    client: Path, python: str, family: Family, form: str, at: Places, image: Path
) -> dict[str, Any]:
    """Run the exported workflow in a server of its own; save its image, and return what is found.

    Raise InputError where the server does not start, or does not draw.
    """
    base = at.folder / "comfyui"
    shutil.rmtree(base, ignore_errors=True)
    _link(base, family, form, at)
    command = [
        python,
        str(client / "main.py"),
        "--cpu",
        f"--port={(port := _free_port())}",
        f"--base-directory={base}",
    ]
    command += ["--disable-all-custom-nodes", "--disable-auto-launch", "--disable-metadata"]
    command += [f"--database-url=sqlite:///{base}/comfyui.db"]
    drawing = _Drawing(port, read_json(at.export(form) / "comfyui_workflow.json"))
    windows = [Window("start", drawing.is_ready), Window("draw", drawing.is_drawn)]
    found = watch(command, at.log, windows, kill=True)
    if drawing.failure:
        raise InputError(f"ComfyUI's server does not draw {form}: {drawing.failure}")
    (drawn,) = (base / "output").glob("*.png")
    shutil.move(drawn, image)
    shutil.rmtree(base)
    return {"windows": found, "replaced": drawing.replaced}


class _Drawing:
    """A workflow on its way through the server at a port."""

    def __init__(self, port: int, graph: dict[str, Any]) -> None:
        self.failure, self.replaced = "", False
        self._url, self._graph, self._number = f"http://127.0.0.1:{port}", graph, ""

    def is_ready(self) -> bool:
        try:
            self._ask("/system_stats")
        except OSError:
            return False
        return True

    def is_drawn(self) -> bool:
        """Return whether there is an image, or never will be; the first call sends the workflow."""
        if not self._number:
            known = self._ask("/object_info")
            self.replaced = api_prompt.replaced(self._graph, known)
            try:
                prompt = api_prompt.convert(self._graph, known)
                self._number = self._ask("/prompt", {"prompt": prompt})["prompt_id"]
            except InputError as error:
                self.failure = str(error)
                return True
        status = self._ask(f"/history/{self._number}").get(self._number, {}).get("status", {})
        if status.get("status_str") == "error":
            self.failure = _reason(status)
        return bool(status)

    def _ask(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self._url + path, body)
        try:
            with urllib.request.urlopen(request, timeout=_WAIT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:  # it says what is wrong with a workflow
            raise InputError(error.read().decode("utf-8", "replace")[:2000]) from None


def _reason(status: dict[str, Any]) -> str:
    for kind, said in status.get("messages", ()):
        if kind == "execution_error":
            return f"{said['node_type']}: {said['exception_message']}"
    return str(status)


def _link(base: Path, family: Family, form: str, at: Places) -> None:
    """Lay links where the note in the workflow says."""
    for name in _FOLDERS:
        (base / "models" / name).mkdir(parents=True)
    for name in ("input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir()
    models = base / "models"
    if form == "diffusers":
        for name in ("diffusion_models", "text_encoders", "vae"):
            (models / name / form).symlink_to(at.export(form))
        return
    (models / "checkpoints" / f"{family.checkpoint}.safetensors").symlink_to(at.single)
    if form == "kohya":
        file = at.exported_file(form, family.part)
        (models / "loras" / file.name).symlink_to(file)
    else:
        (models / "loras" / form).symlink_to(at.export(form))
    for part, name in _ENCODERS.items():
        if (at.pipeline / part).is_dir():
            (file,) = (at.pipeline / part).glob("*.safetensors")
            (models / "text_encoders" / f"{name}.safetensors").symlink_to(file)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
