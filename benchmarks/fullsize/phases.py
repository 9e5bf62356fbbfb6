"""What a user does with a family, one command after the other. Each phase is done once.

Its numbers lie in PHASE.json, so that a killed command continues with the phase that it was in.
"""

import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fullsize.setting import FAMILIES, HELDOUT, REWARDS, Places, Setting
from benchmarks.fullsize.watch import Window, never, python, watch
from r0_jax.errors import InputError
from r0_jax.files import read_json, write_bytes
from r0_jax.workdir import checkpoint
from r0_jax.workdir.workdir import LocalWorkdir

CLOSE = 2  # of 255: what stock diffusers may differ by

Found = dict[str, Any]  # "windows": {name: {seconds, peak_bytes}}, and what else was found


class Phase(NamedTuple):
    name: str
    run: Callable[[Setting, Places], Found]


def phases(asked: Setting) -> list[Phase]:
    """Return what is done for a family, in order."""
    found = [Phase("make", functools.partial(_task, "make", "write the folders"))]
    if not (asked.dtype or asked.accelerator):
        found.append(Phase("forward", functools.partial(_task, "forward", "both dtypes")))
    found.append(Phase("plan", plan))
    if asked.encoded:
        found.append(Phase("encode", encode))
    found += [Phase("train", train), Phase("resume", resume), Phase("sample", sample)]
    for form in FAMILIES[asked.family].formats:
        found.append(Phase(f"export_{form}", functools.partial(export, form)))
    return [*found, Phase("stock", functools.partial(_task, "stock", "draw and compare"))]


def result(folder: Path, phase: str) -> Found | None:
    """Return what a phase found, if it is done."""
    path = folder / f"{phase}.json"
    return read_json(path) if path.is_file() else None


def run_all(asked: Setting, at: Places, done: Callable[[], None]) -> None:
    """Run the phases that are missing; call `done` after each. Delete the models at the end."""
    for phase in phases(asked):
        if result(at.folder, phase.name) is None:
            print(f"{time.strftime('%H:%M:%S')} {asked.family}: {phase.name}", flush=True)
            found = phase.run(asked, at)
            write_bytes(
                at.folder / f"{phase.name}.json", (json.dumps(found, indent=1) + "\n").encode()
            )
            done()
    for path in at.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def config_flags(asked: Setting, at: Places, prompts: bool = True) -> list[str]:
    """Return the flags of every command that reads the config; `prompts`: which may be encoded."""
    recipe = f"--config=configs/{FAMILIES[asked.family].recipe}.py:r0plus"
    config: dict[str, object] = {
        "pretrained": at.pipeline,
        "data.prompts": at.prompts,
        "steps": asked.steps,
        "checkpoint_every": 1,
        "eval_every": asked.steps,
        "eval.num_prompts": 1,
        "eval.grid": 1,
        "eval.term_norms": False,
        "early_stop": 0,
        # So that a few steps change the images.
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
        "ema_decay": 0.5,
        "compilation_cache": at.compiled,
        **{f"heldout_rewards.{name}.path": at.models / model for name, model in HELDOUT.items()},
    }
    for name in REWARDS:
        if name in asked.rewards:
            config[f"rewards.{name}.path"] = at.models / name
        else:
            config[f"rewards.{name}.weight"] = 0.0
    if dtype := training_dtype(asked, at.folder):
        config["dtype"] = dtype
    if asked.size:
        config |= {"height": asked.size, "width": asked.size}
    if asked.batch:
        config |= {"batch_size": asked.batch, "device_batch": 1}
    if asked.encoded and prompts:
        config["data.encoded"] = at.encoded
    if asked.miniature:
        config |= {"lora.rank": 4, "lora.alpha": 8.0}
    if asked.decoder:
        config["objective.decoder"] = at.models / "decoder"
    return [recipe, *(f"--config.{name}={value}" for name, value in config.items())]


def training_dtype(asked: Setting, folder: Path) -> str:
    """Return "" for the recipe's bfloat16, where the generator needs less memory in it."""
    if asked.dtype or (measured := result(folder, "forward")) is None:
        return asked.dtype

    def held(dtype: str) -> float:
        of = measured["forward"][dtype]
        return of["weight_bytes"] + of["temporary_bytes"]

    return "" if held("bfloat16") < held("float32") else "float32"


# --- the phases -----------------------------------------------------------------------------------


def _task(name: str, window: str, asked: Setting, at: Places) -> Found:
    del asked
    command = python("benchmarks.fullsize.tasks", f"--task={name}", f"--folder={at.folder}")
    windows, said = _run(command, at, Window(window, never))
    return json.loads(said.splitlines()[-1]) | {"windows": windows}


def plan(asked: Setting, at: Places) -> Found:
    """Compile the training step without running it, to know what memory it asks for."""
    topology = "local" if asked.accelerator else "cpu"
    flags = [*config_flags(asked, at, prompts=False), f"--topology={topology}", "--steps=0"]
    if asked.encoded:
        flags.append("--config.data.encoded=")
    windows, said = _run(
        python("r0_jax.plan", *flags, "--json"), at, Window("compile the step", never)
    )
    return {"plan": json.loads(said.splitlines()[-1]), "windows": windows}


def encode(asked: Setting, at: Places) -> Found:
    shutil.rmtree(at.encoded, ignore_errors=True)
    command = python(
        "r0_jax.encode_prompts",
        *config_flags(asked, at, prompts=False),
        f"--out={at.encoded}",
        "--batch_size=1",
    )
    return {"windows": _run(command, at, Window("encode the prompts", never))[0]}


def train(asked: Setting, at: Places) -> Found:
    """Train until the checkpoint of the first step is there; then kill the run."""
    shutil.rmtree(at.run, ignore_errors=True)
    windows = [
        Window("load, encode the prompts", lambda: _has(at, 0)),
        Window("evaluation before step 1", lambda: bool(_evaluations(at))),
        Window("compile, step 1, checkpoint; kill -9", lambda: _has(at, 1)),
    ]
    return {"windows": watch(_training(asked, at), _log(at), windows, kill=True)}


def resume(asked: Setting, at: Places) -> Found:
    """Start the command again and let it end; check that no number is invalid.

    It saves at the end alone: a checkpoint that is being written holds a copy of the state.
    """
    log = _log(at)
    start = log.stat().st_size
    windows = [
        Window("load again", lambda: _said(log, start, "continues from step")),
        Window(f"steps to {asked.steps}, checkpoint", lambda: _has(at, asked.steps)),
        Window("evaluation after the last step", never),
    ]
    command = [*_training(asked, at), f"--config.checkpoint_every={asked.steps}"]
    found = watch(command, log, windows)
    rows = _metrics(at)
    bad = sorted({name for row in rows for name, value in row.items() if value is None})
    steps = [row for row in rows if "train/skipped_in_a_row" in row]
    if bad or [row["step"] for row in steps] != list(range(1, asked.steps + 1)):
        raise InputError(f"{at.run}/metrics.jsonl is not that of {asked.steps} steps: {bad}")
    last = steps[-1]
    batch = read_json(at.run / "config.json")["batch_size"]
    return {
        "windows": found,
        "step_seconds": batch / last["perf/images_per_sec"],
        "skipped": sum(row["train/skipped_in_a_row"] > 0 for row in steps),
        "evaluations": _evaluations(at),
    }


def sample(asked: Setting, at: Places) -> Found:
    shutil.rmtree(at.images, ignore_errors=True)
    flags = [f"--height={asked.size}", f"--width={asked.size}"] if asked.size else []
    command = python(
        "r0_jax.sample",
        f"--workdir={at.run}",
        "--step=latest",
        f"--prompts={at.drawn_prompts}",
        f"--latents={at.noise}",
        "--batch_size=1",
        f"--out={at.images}",
        *flags,
    )
    return {"windows": _run(command, at, Window("draw two images, float32", never))[0]}


def export(form: str, asked: Setting, at: Places) -> Found:
    del asked
    out = at.exported / form
    shutil.rmtree(out, ignore_errors=True)
    command = python(
        "r0_jax.export", f"--workdir={at.run}", "--step=latest", f"--format={form}", f"--out={out}"
    )
    windows, _ = _run(command, at, Window(f"--format={form}", never))
    return {
        "windows": windows,
        "disk_bytes": sum(x.stat().st_size for x in out.rglob("*") if x.is_file()),
    }


def far(found: Found) -> list[str]:
    """Return the exports whose images differ from ours, by the result of `stock`."""
    differences = found["differences"]
    return [f for f, value in differences.items() if f != "untrained" and value > CLOSE]


# --- what they look at ----------------------------------------------------------------------------


def _training(asked: Setting, at: Places) -> list[str]:
    return python("r0_jax.main", *config_flags(asked, at), f"--workdir={at.run}")


def _run(command: list[str], at: Places, window: Window) -> tuple[dict[str, Any], str]:
    """Run a command; return its window and its output."""
    log = _log(at)
    start = log.stat().st_size if log.is_file() else 0
    windows = watch(command, log, [window])
    return windows, log.read_bytes()[start:].decode("utf-8", "replace")


def _log(at: Places) -> Path:
    return at.folder / "log.txt"


def _said(log: Path, start: int, text: str) -> bool:
    return text.encode() in log.read_bytes()[start:]


def _has(at: Places, step: int) -> bool:
    return step in checkpoint.steps(LocalWorkdir(at.run))


def _metrics(at: Places) -> list[dict[str, float | None]]:
    path = at.run / "metrics.jsonl"
    whole = path.read_text("utf-8").rpartition("\n")[0] if path.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _evaluations(at: Places) -> dict[str, dict[str, float | None]]:
    """Return {step: rewards} of the evaluations."""
    found = {}
    for row in _metrics(at):
        values = {n: x for n, x in row.items() if n.startswith(("eval/", "heldout/"))}
        if values and not any(x is not None and math.isnan(x) for x in values.values()):
            found[str(row["step"])] = values
    return found
