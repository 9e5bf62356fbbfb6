"""Does with published models at full size what a user does, on random weights:

    python -m benchmarks.fullsize --out=docs/reports/fullsize.md      # all families: make fullsize
    python -m benchmarks.fullsize --family=sd15 --size=256 --steps=3  # one of them
    python -m benchmarks.fullsize --family=sd15 --miniature           # tries the command, a minute

It makes the folders, plans, trains until the first checkpoint, kills the run, resumes it, draws,
exports in every format and draws the exports with stock diffusers. Each is a command in a process
of its own, whose seconds and memory are measured. Folders of weights are deleted after use. The
same command continues after a kill; what is in --folder is not done again. Without an accelerator
images are smaller and a step has one; flags replace that. Linux only.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks.fullsize import phases, report, setting
from benchmarks.fullsize.setting import FAMILIES, ON_CPU, REWARDS, Places, Setting
from r0_jax import cli
from r0_jax.errors import InputError

# XLA's other scheduler, and the pass that moves work out of loops, keep float32 copies of all
# bfloat16 weights.
XLA_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion"
)
_ROOM = 60e9  # bytes of disk that a family takes


def define_flags() -> None:
    flags.DEFINE_list("family", list(FAMILIES), f"any of {', '.join(FAMILIES)}")
    flags.DEFINE_integer("size", None, "pixels of a side; 0: the recipe's", lower_bound=0)
    flags.DEFINE_integer("batch", None, "images of a step; 0: the recipe's", lower_bound=0)
    flags.DEFINE_list("rewards", None, f"that are trained on, any of {', '.join(REWARDS)}")
    flags.DEFINE_bool("encoded", None, "encode the prompts before the training")
    flags.DEFINE_bool("decoder", None, "decode for the rewards with a tiny autoencoder")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "default: the recipe's, unless it needs more memory"
    )
    flags.DEFINE_integer("steps", 3, "of the training", lower_bound=2)
    flags.DEFINE_bool("miniature", False, "tiny networks, to try this command")
    cli.define_path("folder", "runs/fullsize", "for results, and weights until they are deleted")
    cli.define_path("out", None, "Markdown file of the report; printed by default")


def settings() -> dict[str, Setting]:
    """Return the setting of each family that is asked for."""
    given = flags.FLAGS
    if unknown := set(given.family) - set(FAMILIES):
        raise InputError(f"--family={unknown.pop()} is unknown; known: {', '.join(FAMILIES)}")
    if unknown := set(given.rewards or ()) - set(REWARDS):
        raise InputError(f"--rewards={unknown.pop()} is unknown; known: {', '.join(REWARDS)}")
    # In another process, since an accelerator is not shared.
    backend = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    found = {}
    for name in given.family:
        fields: dict[str, object] = {} if backend != "cpu" else ON_CPU | FAMILIES[name].on_cpu
        if given.miniature:
            fields["size"] = 0
        fields |= {
            field: given[field].value
            for field in ("size", "batch", "rewards", "encoded", "decoder", "dtype")
            if given[field].value is not None
        }
        found[name] = Setting(
            family=name,
            steps=given.steps,
            miniature=given.miniature,
            accelerator=backend != "cpu",
            **fields,
        )
    return found


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory is read from /proc, which only Linux has")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    root, far = Path(given.folder).absolute(), []
    for name, asked in settings().items():
        at = Places(root / name)
        if (at.folder / "setting.json").is_file():
            if setting.read(at.folder) != asked:
                raise InputError(
                    f"{at.folder} was begun with other flags: give those, or delete the folder"
                )
        else:
            setting.write(at.folder, asked)
        held = sum(path.stat().st_size for path in at.folder.rglob("*") if path.is_file())
        if not asked.miniature and shutil.disk_usage(root).free + held < _ROOM:
            raise InputError(f"{root} has no {_ROOM / 1e9:.0f} GB free: give another --folder")
        # `plan` compiles the step, so that the training finds it there, unless a CPU could not read
        # it again (r0_jax/compilation_cache.py).
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(at.compiled)
        phases.run_all(asked, at, lambda: report.publish(root, given.out))
        far += [f"{name} {form}" for form in phases.far(phases.result(at.folder, "stock"))]
    report.publish(root, given.out, show=True)
    if far:
        print(f"stock diffusers draws other images: {', '.join(far)}", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
