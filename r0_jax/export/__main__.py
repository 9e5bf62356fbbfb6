"""Exports a trained generator: a diffusers folder or a LoRA file, and a ComfyUI workflow.

python -m r0_jax.export --workdir=W --out=DIR --format=diffusers
python -m r0_jax.export --workdir=W --out=DIR --format=peft     LoRA for diffusers
python -m r0_jax.export --workdir=W --out=DIR --format=kohya    LoRA for ComfyUI, A1111, Forge
"""

from r0_jax import signals

if __name__ == "__main__":
    signals.end_at_once()  # until cli.run: the imports below take seconds

from pathlib import Path
from typing import get_args

from absl import flags

from r0_jax import cli, remote
from r0_jax.export import hub
from r0_jax.export.folder import Format, export
from r0_jax.weights import convert
from r0_jax.workdir import mirror


def define_flags() -> None:
    """Define the flags; not on import, since flags are global and commands share names."""
    cli.define_path("workdir", None, "folder of the run", required=True)
    cli.define_path("out", None, "folder to write", required=True)
    flags.DEFINE_enum(
        "format",
        None,
        list(get_args(Format)),
        "diffusers: a whole pipeline with merged adapters; peft: the adapters for diffusers; "
        "kohya: the adapters for ComfyUI and A1111",
        required=True,
    )
    flags.DEFINE_string(
        "step",
        "",
        "checkpoint: its step, best (by the held-out reward) or latest;"
        " by default the best if it was measured, else the latest",
    )
    flags.DEFINE_bool("ema", True, "export the moving average; --noema: the raw parameters")
    flags.DEFINE_enum(
        "dtype", "float32", list(convert.DTYPES), "dtype of the trained weights on disk"
    )
    flags.DEFINE_bool(
        "one_file",
        False,
        "with --format=diffusers: write the trained network as one file, as ComfyUI reads it, also "
        "if it is larger than 10 GB",
    )
    flags.DEFINE_bool("overwrite", False, "replace an earlier export in --out")
    cli.define_path("pretrained", None, "the pretrained pipeline, if it has moved")
    flags.DEFINE_string(
        "base_model",
        None,
        "name of the pretrained pipeline in the model card: "
        "its name on the Hub, or a path that readers have",
    )
    flags.DEFINE_string(
        "push_to_hub",
        None,
        "upload the export to the Hugging Face Hub as the model owner/name, which is private if it "
        "is new",
    )


def main(argv: list[str]) -> None:
    del argv
    fields = flags.FLAGS
    if fields.push_to_hub is not None:
        hub.check(fields.push_to_hub)
    with mirror.workdir(fields.workdir) as workdir:
        step = export(
            workdir,
            remote.output(fields.out),
            fields.format,
            step=fields.step,
            ema=fields.ema,
            dtype=fields.dtype,
            one_file=fields.one_file,
            overwrite=fields.overwrite,
            pretrained=fields.pretrained,
            base_model=fields.base_model,
        )
    print(f"step {step} of {fields.workdir} is in {fields.out} ({fields.format})")
    if fields.push_to_hub is not None:
        message = f"Export step {step} ({fields.format})"
        print(f"uploaded: {hub.push(Path(fields.out), fields.push_to_hub, message)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
