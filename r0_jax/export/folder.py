"""Write a trained generator for PyTorch: a diffusers folder, or a LoRA file."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

from r0_jax import files
from r0_jax.errors import InputError
from r0_jax.export import comfyui, examples, kohya, licence, model_card
from r0_jax.files import copy_file, pickles, read_json, temporary_name
from r0_jax.method import lora
from r0_jax.pipelines.folder import mend_sample_size
from r0_jax.weights import convert
from r0_jax.workdir.run import HostParams, Run, open_run
from r0_jax.workdir.workdir import Workdir

Format = Literal["diffusers", "peft", "kohya"]
LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for adapters


def export(
    workdir: Workdir,
    out: Path,
    form: Format,
    *,
    step: str = "",
    ema: bool = True,
    dtype: str = "float32",
    one_file: bool = False,
    overwrite: bool = False,
    pretrained: str | None = None,
    base_model: str | None = None,
) -> int:
    """Export a run to `out`, completely or not at all; return the exported step.

    With `one_file` the trained network of a diffusers folder is one file, however large.
    Raise InputError if the run cannot be read, if it lacks adapters for `form`, or if the family
    does not support `form`. Also raise it if `out` holds files that must not be replaced.
    """
    _check_out(out, overwrite)
    run, name = open_run(workdir, pretrained), out.resolve().name
    if form != "diffusers" and not run.config.lora.rank:
        raise InputError(
            f"{workdir.path} trained all weights, so there are no adapters to write: use "
            "--format=diffusers"
        )
    chosen = run.choose_step(step)
    if form == "kohya":
        kohya.check_family(run.index["_class_name"])
    if chosen == 0:
        warnings.warn(
            "step 0 is the pretrained generator: nothing is trained in it, and adapters are zero; "
            "--step=latest takes the newest checkpoint",
            stacklevel=2,
        )
    with files.building(out.resolve()) as building:
        _check_apart(out, run)
        params = run.params(chosen, ema)
        base_model = base_model or model_card.base_model(run)
        if form == "peft":
            write_peft(run, params, building, dtype)
        elif form == "kohya":
            kohya.write(run, params, building / f"{name}.safetensors", dtype, chosen, base_model)
            _write_scheduler(run, building)
        else:
            write_diffusers(run, params, building, dtype, one_file)
        if not (no_workflow := comfyui.why_not(run, form, building)):
            _write_json(
                building / comfyui.FILE,
                comfyui.workflow(run, form, building, name, base_model, model_card.PROMPT),
            )
        for path in run.pretrained.glob("LICENSE*"):
            if path.is_file():
                copy_file(path, building / path.name, run.pretrained)
        card = model_card.write(
            run,
            form,
            chosen,
            ema,
            dtype,
            base_model,
            name,
            no_workflow,
            licence.of_folder(run.pretrained),
            examples.copy(run, chosen, building) if ema else [],  # evaluated are averaged weights
        )
        (building / "README.md").write_text(card, encoding="utf-8")
        _move(building, out.resolve())
    return chosen


def write_diffusers(
    run: Run, params: HostParams, folder: Path, dtype: str, one_file: bool = False
) -> None:
    """Write a copy of the pretrained folder with the trained weights and the trained grid.

    Copy the other parts byte for byte, without pickles. Omit a part whose weights are only
    pickles, such as an old safety checker. Correct the sample_size of an old generator config.
    """
    part, source = run.pipeline.generator_part, run.pretrained
    index = dict(run.index)
    for name, kind in run.index.items():
        if isinstance(kind, list) and kind[0] and name not in (part, "scheduler"):
            if name in run.left_out or not _copy_part(source, folder, name):
                index[name] = [None, None]
    index["scheduler"] = ["diffusers", run.scheduler_config.class_name]
    _write_json(folder / "model_index.json", index)
    _write_scheduler(run, folder / "scheduler")
    (folder / part).mkdir()
    copy_file(source / part / "config.json", folder / part / "config.json", source)
    fields = read_json(source / part / "config.json")
    if (mended := mend_sample_size(fields)) != fields:
        _write_json(folder / part / "config.json", mended)
    weights = run.merged_weights(params)  # rounded once, to `dtype`
    if one_file:
        convert.save(weights, folder / part / "diffusion_pytorch_model.safetensors", dtype)
    else:
        convert.save_shards(weights, folder / part, "diffusion_pytorch_model", dtype)


def write_peft(run: Run, params: HostParams, folder: Path, dtype: str) -> None:
    """Write the adapters with PEFT's metadata, and the scheduler of the training.

    B includes the factor alpha / rank: programs that read no metadata assume alpha = rank.
    """
    part = run.pipeline.generator_part
    adapter = {
        "r": run.generator.rank,
        "lora_alpha": run.generator.rank,
        "target_modules": lora.targets(run.pipeline.networks[part].shapes, run.generator.targets),
    }
    # diffusers' `load_lora_weights` reads it.
    metadata = json.dumps({f"{part}.{name}": x for name, x in adapter.items()}, indent=2)
    folded = lora.fold(params, run.generator.scale)
    named = {f"{part}.{name}": value for name, value in folded.items()}
    convert.save(named, folder / LORA_FILE, dtype, {"lora_adapter_metadata": metadata})
    _write_scheduler(run, folder)


def _copy_part(pretrained: Path, building: Path, part: str) -> bool:
    """Copy a part's text files and safetensors; return False if there is nothing to copy.

    Raise InputError for a link that leads out of the pretrained folder.
    """
    source, target = pretrained / part, building / part
    # Look for an index too: its shards may have any name.
    stem = next(
        (
            stem
            for stem in ("diffusion_pytorch_model", "model")
            for end in (".safetensors", ".safetensors.index*.json")
            if any(source.glob(f"{stem}*{end}"))
        ),
        None,
    )
    pickled = bool(pickles(source))
    if not source.is_dir() or (pickled and stem is None):
        return False
    target.mkdir()
    for path in source.iterdir():
        if (
            path.suffix in (".json", ".txt", ".model")
            and ".index." not in path.name
            and path.is_file()
        ):
            copy_file(path, target / path.name, pretrained)
    if stem is None:
        return True
    # A variant such as model.fp16.safetensors gets the plain name, which loads by default.
    weights = convert.find_weights(source, stem)
    if weights.suffix == ".safetensors":
        copy_file(weights, target / f"{stem}.safetensors", pretrained)
    else:
        copy_file(weights, target / f"{stem}.safetensors.index.json", pretrained)
        for path in convert.find_files(source, stem):
            copy_file(path, target / path.name, pretrained)
    return True


def _write_scheduler(run: Run, folder: Path) -> None:
    _write_json(folder / "scheduler_config.json", run.scheduler_config.fields)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise InputError(
            f"{out} exists already; choose another --out, or replace an earlier "
            "export with --overwrite"
        )
    path = out / "README.md"
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if model_card.MADE_WITH not in card:
        raise InputError(
            f"{out} is not an earlier export, so --overwrite does not delete it; "
            "choose another --out"
        )


def _check_apart(out: Path, run: Run) -> None:
    """Check that no input lies in `out`, which an export replaces; else raise InputError."""
    for path in (run.workdir.path.resolve(), run.pretrained.resolve()):
        if out.resolve() in (path, *path.parents):
            raise InputError(f"--out={out} holds {path}, an input; choose another --out")


def _move(building: Path, out: Path) -> None:
    """Replace `out` by `building`; delete the old `out` only after success."""
    old = temporary_name(out, "old")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(building, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
