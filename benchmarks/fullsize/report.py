"""docs/reports/fullsize.md, from the numbers of the phases that are done."""

import importlib.metadata
import os
import platform
from pathlib import Path

from benchmarks.fullsize import phases, setting
from benchmarks.fullsize.setting import FAMILIES, HELDOUT, REWARDS, Setting
from benchmarks.load import cpu
from benchmarks.measure import table
from r0_jax.files import write_bytes

_GIB = 2**30
_COMMANDS = {
    "make": "benchmarks.fullsize",
    "forward": "benchmarks.fullsize",
    "plan": "plan",
    "encode": "encode_prompts",
    "train": "main",
    "resume": "main, again",
    "sample": "sample",
    "stock": "stock diffusers",
}


def publish(root: Path, out: str | None, show: bool = False) -> None:
    """Write the report to `out`; without, print it if `show`."""
    if out is not None:
        write_bytes(out, text(root).encode())
    elif show:
        print(text(root))


def text(root: Path) -> str:
    """Return the report of all families in a folder."""
    begun = [name for name in FAMILIES if (root / name / "setting.json").is_file()]
    missing = [name for name in FAMILIES if name not in begun]
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "flax", "torch", "diffusers", "transformers")
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    sections = [family(root / name) for name in begun]
    if missing:
        sections.append(
            "## Not run yet\n\n"
            + "\n".join(
                f"- {FAMILIES[n].title}: `make fullsize FLAGS=--family={n}`" for n in missing
            )
        )
    made_on = (
        f"Made on {os.cpu_count()} CPU cores ({cpu()}), {memory:.1f} GiB; Python "
        f"{platform.python_version()}, {packages}. The load average was {os.getloadavg()[2]:.0f} "
        "when this was written: where it is above the cores, other work shared them and a quiet "
        "machine takes fewer seconds."
    )
    return f"""# Full size

What a user does with a published model, at its full width and depth, with random weights: the
recipe's `:r0plus` is trained, killed with `kill -9` after its first checkpoint, resumed, evaluated,
exported in every format and drawn by stock diffusers. Written by `make fullsize`, which says how it
is done. Each row is a command of its own, or a part of one. Memory is the most that its process
held. Random weights make no images worth seeing, but memory, seconds and formats are the real ones.

{made_on}

{chr(10).join(sections)}
"""


def family(folder: Path) -> str:
    """Return the section of a family."""
    asked = setting.read(folder)
    names = [phase.name for phase in phases.phases(asked)]
    found = {n: x for n in names if (x := phases.result(folder, n)) is not None}
    rows = [
        [
            f"`{_COMMANDS.get(name, 'export')}`" + f": {window}",
            f"{x['seconds']:,.0f}",
            f"{x['peak_bytes'] / _GIB:.1f}",
        ]
        for name, of in found.items()
        for window, x in of["windows"].items()
    ]
    parts = [f"## {FAMILIES[asked.family].title}", _reduced(asked, folder)]
    if asked.miniature:
        parts.append("**In miniature: these numbers only try the command.**")
    parts.append(table(["what", "seconds", "peak, GiB"], rows))
    parts += [part(found[name], found) for name, part in _TEXTS.items() if name in found]
    if left := [name for name in names if name not in found]:
        parts.append(
            f"Not done yet: {', '.join(left)}. `make fullsize FLAGS='{asked.flags}'` continues."
        )
    return "\n\n".join(parts) + "\n"


def _reduced(asked: Setting, folder: Path) -> str:
    made = phases.result(folder, "make")
    pixels = " x ".join(map(str, made["pixels"])) + " px" if made else "The recipe's size"
    said = [
        f"{pixels}, {asked.steps} steps of {_images(asked.batch)}",
        f"trained on {', '.join(asked.rewards)}; held out: {', '.join(HELDOUT)}",
        f"{phases.training_dtype(asked, folder) or 'bfloat16, as the recipe says'}",
    ]
    if asked.encoded:
        said.append("prompts encoded before the training")
    if asked.decoder:
        said.append("a tiny autoencoder decodes for the rewards")
    out = "; ".join(said) + "."
    if made and (left := [name for name in REWARDS if name not in asked.rewards]):
        size = 2 * sum(made["parameters"][name] for name in left) / _GIB
        out += f" Left out are {' and '.join(left)}: {size:.1f} GiB in bfloat16."
    return out


def _images(count: int) -> str:
    return {0: "as many images as the recipe has", 1: "one image"}.get(count, f"{count} images")


def _made(made: dict, found: dict) -> str:
    counts = ", ".join(f"{n} {x / 1e6:,.0f} M" for n, x in made["parameters"].items())
    return f"Parameters: {counts}. On disk the models take {made['disk_bytes'] / 1e9:.1f} GB."


def _forward(of: dict, found: dict) -> str:
    said = [
        f"{dtype} takes {x['seconds']:.1f} s and {x['weight_bytes'] / _GIB:.2f} GiB of weights, "
        f"with {x['temporary_bytes'] / _GIB:.2f} GiB beside them"
        for dtype, x in of["forward"].items()
    ]
    return f"One call of the generator in {'; '.join(said)}."


def _plan(of: dict, found: dict) -> str:
    memory = of["plan"]["memory"]
    said = (
        f"`plan` says that the step holds {memory['peak_bytes'] / _GIB:.1f} GiB at its peak, of "
        f"them {memory['by_kind']['activations'] / _GIB:.1f} GiB activations, and is "
        f"{of['plan']['flops_per_step'] / 1e12:.1f} TFLOP. It was traced in "
        f"{of['plan']['trace_seconds']:,.0f} s and compiled in "
        f"{of['plan']['compile_seconds']:,.0f} s."
    )
    if "resume" in found:
        windows = list(found["resume"]["windows"].values())
        said += f" The process that ran it held {windows[1]['peak_bytes'] / _GIB:.1f} GiB."
    return said


def _resume(of: dict, found: dict) -> str:
    rewards = "; ".join(
        f"step {step}: " + ", ".join(f"{n} {x:.4g}" for n, x in values.items())
        for step, values in of["evaluations"].items()
    )
    return (
        f"The last step took {of['step_seconds']:,.0f} s; {of['skipped']} steps were skipped. "
        f"Evaluations: {rewards}."
    )


def _stock(of: dict, found: dict) -> str:
    differences = dict(of["differences"])
    untrained = differences.pop("untrained")
    said = ", ".join(f"{form} {value:.0f}" for form, value in differences.items())
    return (
        f"The most that a color in stock diffusers' images differs from ours, of 255: {said} "
        f"(allowed are {phases.CLOSE}). Without the training it would be {untrained:.0f}. The "
        f"standard deviation of colors is {of['standard_deviation']:.0f}."
    )


_TEXTS = {"make": _made, "forward": _forward, "plan": _plan, "resume": _resume, "stock": _stock}
