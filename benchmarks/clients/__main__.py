"""Gives every export to the programs that it is for:

    python -m benchmarks.clients --out=docs/reports/clients.md      # stock diffusers: make clients
    python -m benchmarks.clients --family=sd15 --comfyui=DIR --comfyui_python=DIR/venv/bin/python

A model of random weights at full width gets random adapters, which are exported in every format.
Each client's own code loads each format that it reads, in a process of its own. Its weights are
compared with the adapters, and images with those of stock diffusers. Clients that no package
registry has are given as checkouts, with the Python that has what they need. The same command
continues after a kill and repeats what failed; what is in --folder is not done again. Linux only.
"""

import os
import shutil
import sys
from pathlib import Path

from absl import flags

from benchmarks.clients import checks, report
from benchmarks.clients.checks import OURS, Check, Client
from benchmarks.clients.setting import FAMILIES, Places
from benchmarks.fullsize.watch import Window, never, python, watch
from r0_jax import cli
from r0_jax.errors import InputError

_ROOM = 35e9  # bytes of disk that the largest family takes
# Client -> the file that is in its checkout; None for a package.
_CHECKOUTS = {
    "comfyui": "main.py",
    "sd_scripts": "networks/merge_lora.py",
    "forge": "backend/patcher/lora.py",
}


def define_flags() -> None:
    flags.DEFINE_list("family", list(FAMILIES), f"any of {', '.join(FAMILIES)}")
    for name in _CHECKOUTS:
        title = report.CLIENTS[name].title
        cli.define_path(name, None, f"checkout of {title}")
        cli.define_path(f"{name}_python", None, f"Python that {title} runs in; default: this one")
    cli.define_path(
        "sdcpp_python", None, "Python that stable-diffusion-cpp-python is installed for"
    )
    cli.define_path("folder", "runs/clients", "for results, and weights until they are deleted")
    cli.define_path("out", None, "Markdown file of the report; printed by default")


def clients() -> dict[str, Client]:
    """Return the clients that are given."""
    given = flags.FLAGS
    found = {"diffusers": OURS}
    for name, file in _CHECKOUTS.items():
        interpreter = given[f"{name}_python"].value
        if given[name].value is None:
            if interpreter is not None:
                raise InputError(f"--{name}_python is for --{name}=DIR, which is missing")
            continue
        folder = Path(given[name].value).absolute()
        if not (folder / file).is_file():
            title = report.CLIENTS[name].title
            raise InputError(f"--{name}={folder} is no checkout of {title}: it has no {file}")
        found[name] = Client(
            folder, _interpreter(f"{name}_python") if interpreter else sys.executable
        )
    if given.sdcpp_python is not None:
        found["sdcpp"] = Client(None, _interpreter("sdcpp_python"))
    return found


def _interpreter(name: str) -> str:
    path = Path(flags.FLAGS[name].value).absolute()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise InputError(f"--{name}={path} is not a program: give a Python")
    return str(path)


def missing(family: str, given: dict[str, Client], at: Places) -> list[Check]:
    """Return the checks of a family that are left to do: those not done, and those that failed."""
    found = [check for check in checks.all_of(family) if check.client in given]
    done = {check: checks.result(check, at) for check in found}
    return [check for check, result in done.items() if result is None or not checks.is_good(result)]


def main(argv: list[str]) -> int:
    del argv
    given = flags.FLAGS
    if unknown := set(given.family) - set(FAMILIES):
        raise InputError(f"--family={unknown.pop()} is unknown; known: {', '.join(FAMILIES)}")
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory is read from /proc, which only Linux has")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    root, tried = Path(given.folder).absolute(), clients()
    for family in given.family:
        at = Places(root / family)
        if not (left := missing(family, tried, at)):
            continue
        if not at.done.is_file():
            at.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(root).free < _ROOM:
                raise InputError(f"{root} has no {_ROOM / 1e9:.0f} GB free: give another --folder")
            print(f"{family}: write the models", flush=True)
            command = python(
                "benchmarks.clients.material", f"--family={family}", f"--folder={at.folder}"
            )
            watch(command, at.log, [Window("make", never)])
        for check in left:
            print(f"{family}: {check.name}", flush=True)
            checks.run(check, tried[check.client], at)
            report.publish(root, given.out)
        if not missing(family, tried, at):  # else the same command tries again
            shutil.rmtree(at.models)
    report.publish(root, given.out, show=True)
    bad = report.failed(root)
    if bad:
        print(f"not as they should be: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
