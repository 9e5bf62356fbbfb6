"""The model card, README.md of an export: Hub metadata, usage, recipe and measurements."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from ml_collections import ConfigDict

from r0_jax import remote
from r0_jax.diffusion import grid, schedulers
from r0_jax.errors import printable
from r0_jax.evaluation import result_table
from r0_jax.export import comfyui, kohya
from r0_jax.export.examples import Example
from r0_jax.workdir.run import Run

MADE_WITH = "Written by `python -m r0_jax.export"  # marks an export: --overwrite looks for it
PROMPT = "a large red circle"


def write(
    run: Run,
    form: str,
    step: int,
    ema: bool,
    dtype: str,
    base_model: str,
    name: str,
    no_workflow: str,
    licence: dict[str, str],
    examples: Sequence[Example],
) -> str:
    """Return the model card of an export in the format `form`.

    Its Python snippet runs in the exported folder, which is called `name`. `base_model` is the
    name of the pretrained pipeline for readers. `no_workflow` is what `comfyui.why_not` returned.
    `licence` has the Hub's fields of the pretrained model's licence. `examples` are images in the
    exported folder.
    """
    num_steps, is_lora = run.config.sampler.num_steps, form != "diffusers"
    rows = "\n".join(
        f"| {_escape(label)} | {_escape(value)} |"
        for label, value in _recipe(run, step, ema, base_model).items()
    )
    return f"""---
{_metadata(is_lora, base_model, licence, examples)}
---

# {_escape(base_model.rstrip("/").split("/")[-1])} in {num_steps} steps

A text-to-image generator that takes {num_steps} steps {run.guidance}, made from
{_code(base_model)} by regularized reward maximization (R0) with r0_jax. It is a derivative of that
model, whose licence applies{_named(licence)}.

{_shown(examples)}## Use

In this folder (elsewhere, replace `"."` by its path or its name on the Hub):

```python
{_snippet(run, form, dtype, base_model, name)}
```
{_LORA_NOTES if is_lora else ""}{_grid_notes(run)}{_program_notes(run, form, name, no_workflow)}
## Recipe

| | |
| --- | --- |
{rows}

{_numbers(run.workdir.path / "eval.json")}{MADE_WITH} --format={form}`.
"""


def _metadata(
    is_lora: bool, base_model: str, licence: dict[str, str], examples: Sequence[Example]
) -> str:
    """Return the fields that the Hub reads, as YAML."""
    optional: dict[str, Any] = dict(licence)
    if examples:
        optional["widget"] = [{"text": x.prompt, "output": {"url": x.file}} for x in examples]
    return ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if is_lora else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "few-step", "r0"] + ["lora"] * is_lora,
        **optional,
    ).to_yaml()


def _named(licence: dict[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license")
    return f" ({_escape(name)})" if name else ""


def _shown(examples: Sequence[Example]) -> str:
    """Return the images as a table, each above its prompt."""
    if not examples:
        return ""
    rows = [
        [f"![{_escape(x.prompt)}]({x.file})" for x in examples],
        ["---"] * len(examples),
        [_escape(x.prompt) for x in examples],
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nNot chosen: the first prompts of the run's last evaluation.\n\n"


_LORA_NOTES = """
The scale of the LoRA is 1. diffusers reports that it finds no LoRA for the text encoder. This is
correct: the text encoder was not trained.
"""


def _snippet(run: Run, form: str, dtype: str, base_model: str, name: str) -> str:
    pipeline = run.index["_class_name"]
    scheduler = run.scheduler_config.class_name
    # Needed for float32 too: transformers would keep the dtype of the text encoders' files.
    lines, options = ["import torch"], f", dtype=torch.{dtype}"
    options += "".join(f", {part}=None" for part in run.left_out)
    if form != "diffusers":
        file = f", weight_name={_string(f'{name}.safetensors')}" if form == "kohya" else ""
        source = _string(base_model)
        lines += [
            f"from diffusers import {scheduler}, {pipeline}  # needs peft too",
            "",
            f"pipeline = {pipeline}.from_pretrained({source}{options})",
            f'pipeline.scheduler = {scheduler}.from_pretrained(".")',
            f'pipeline.load_lora_weights("."{file})',
        ]
    else:
        lines += [
            f"from diffusers import {pipeline}",
            "",
            f'pipeline = {pipeline}.from_pretrained("."{options})',
        ]
    call = (
        f'"{PROMPT}", num_inference_steps={run.config.sampler.num_steps}, '
        f"guidance_scale={_stock_guidance(run)}"
    )
    if run.pipeline.size:
        height, width, _ = run.pipeline.image_shape
        call += f", height={height}, width={width}"
    lines += [f"image = pipeline({call}).images[0]", 'image.save("image.png")']
    return "\n".join(lines)


def _stock_guidance(run: Run) -> str:
    """Return the guidance in the convention of the stock pipeline."""
    return f"{run.config.sampler.guidance_scale - 1 + run.pipeline.no_guidance:g}"


def _grid_notes(run: Run) -> str:
    """Return how to set the trained grid in a program that does not read our scheduler config."""
    steps, config = run.config.sampler.num_steps, run.pipeline.scheduler_config
    fresh = run.config.sampler.eta == 1
    if not config.is_flow:
        timesteps = grid.grid(config, steps, run.config.sampler.eta).timesteps
        stock = (
            f"LCM with `original_inference_steps={steps}`. Each step draws its noise anew"
            if fresh
            else 'DDIM with\n`timestep_spacing="trailing"`'
        )
        return f"""
The trained grid is the timesteps {", ".join(map(str, timesteps))}, as in {stock}.
"""
    if steps == 1:
        return "\nThe only step is at sigma 1, where every flow-matching scheduler starts.\n"
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in schedulers.even_sigmas(steps))
    anew = "Each step draws its noise anew (`stochastic_sampling=True`). " if fresh else ""
    if config.even_sigmas:
        return f"""
{anew}diffusers 0.39 and newer visit the trained grid in {steps} steps. Older ones do with
`sigmas=[{sigmas}]`. `guidance_scale={run.pipeline.no_guidance}` is no guidance here: this pipeline
adds 1 to it.
"""
    return f"""
{anew}With this scheduler's shift and shift_terminal, {steps} steps visit the trained grid. With the
base model's scheduler (shift {config.noise.shift:g}), pass `sigmas=[{sigmas}]`.
"""


def _program_notes(run: Run, form: str, name: str, no_workflow: str) -> str:
    """Return how to use the export in other programs."""
    steps = run.config.sampler.num_steps
    if no_workflow:
        return f"\nThere is no workflow for ComfyUI: {no_workflow}.\n"
    notes = f"""
In ComfyUI, which supports the published architectures, drop `{comfyui.FILE}` onto the
canvas. Its note says where to put the files.
"""
    if form != "kohya" and kohya.supports(run.index["_class_name"]):
        notes += "\nInvokeAI reads only the single file of `--format=kohya`.\n"
    if form == "kohya" and run.config.sampler.eta == 1:
        notes += """
A1111 and Forge have no sampler that draws as this model was trained: their LCM visits other
timesteps.
"""
    elif form == "kohya" and 1000 % steps == 0:
        file, tag = _code(f"{name}.safetensors"), _code(f"<lora:{name}:1>")
        notes += f"""
In A1111 and Forge, put {file} into models/Lora and write {tag} in the
prompt. Choose sampler Euler, schedule type Simple, {steps} sampling steps and CFG scale
{run.config.sampler.guidance_scale:g}.
"""
    return notes


def _recipe(run: Run, step: int, ema: bool, base_model: str) -> dict[str, object]:
    config, trained = run.config, "all weights"
    if config.lora.rank:
        trained = f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    drawn = f"eta {config.sampler.eta:g} ({run.scheduler_config.class_name})"
    eta = "eta drawn from [0, 1] at each step" if config.sampler.random_eta else drawn
    scores = run.metrics(step)
    return {
        "pretrained pipeline": base_model,
        "method": config.objective.method,
        "trained": trained,
        "weights": f"step {step} of {config.steps}, {'EMA' if ema else 'not averaged'}",
        "rewards": _weighted(config.rewards),
        "held-out rewards": ", ".join(config.heldout_rewards) or "none",
        "regularizers": _weighted(config.regularizers),
        "images per step": config.batch_size,
        "seed": config.seed,
        "sampler": f"{config.sampler.num_steps} steps {run.guidance}, {drawn}",
        "sampler in training": f"{config.sampler.num_steps} steps, {eta}",
        **{f"{name} at this step": f"{x:.4g}" for name, x in scores.items() if x is not None},
    }


def _weighted(entries: ConfigDict) -> str:
    return ", ".join(f"{name} x {e.weight:g}" for name, e in entries.items() if e.weight) or "none"


def _escape(value: object) -> str:
    """Return a value as one line of plain Markdown text, whatever it holds."""
    text = re.sub(r"([\\`*\[\]<>|~&#$])", r"\\\1", printable(str(value)))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)


def _code(value: object) -> str:
    """Return a value as Markdown code in one line; backticks in it need a longer fence."""
    text = printable(str(value))
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def _string(value: str) -> str:
    """Return a text as a string of JSON, YAML and Python that stays in its line."""
    literal = json.dumps(value, ensure_ascii=False)
    return literal if literal.isprintable() else json.dumps(value).replace("\x7f", "\\u007f")


def _numbers(path: Path) -> str:
    if not path.exists():
        return ""
    evaluation = result_table.read_evaluation(path)
    table = result_table.markdown_table(evaluation)
    facts = [f"{_escape(evaluation['prompts'])} prompts"] if "prompts" in evaluation else []
    facts += [_escape(evaluation["checkpoint"])] if "checkpoint" in evaluation else []
    of = f" ({', '.join(facts)})" if facts else ""
    return f"""## Measured

The run's last evaluation{of}, of the averaged weights, with 95 % intervals.

{table}
"""


def base_model(run: Run) -> str:
    """Return a name for the pretrained pipeline.

    This is its name on the Hub if it lies in the Hub's cache. Else it is a relative path, or the
    name of the folder of an absolute path or URL.
    """
    path = Path(run.config.pretrained)
    for parent in path.parents:  # the Hub's cache: models--owner--name/snapshots/<commit>
        if match := re.fullmatch(r"models--(.+?)--(.+)", parent.name):
            return f"{match[1]}/{match[2]}"
    moved = path.is_absolute() or remote.url_of(path)
    return path.name if moved else path.as_posix()
