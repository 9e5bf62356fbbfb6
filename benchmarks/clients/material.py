"""What clients are given: a pipeline of random weights, a run of it, and the run's exports.

    python -m benchmarks.clients.material --family=sd15 --folder=runs/clients/sd15

Nobody trains the run: its adapters are random, of the size of the weights that they change.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from safetensors.numpy import save_file

from benchmarks.clients import single_file
from benchmarks.clients.setting import FAMILIES, Family, Places
from benchmarks.fullsize import folders
from r0_jax import cli, config
from r0_jax.errors import InputError
from r0_jax.method import train_state
from r0_jax.method.generator import Generator
from r0_jax.pipelines import families
from r0_jax.weights import convert
from r0_jax.weights.network import Params
from r0_jax.workdir.checkpoint_manager import Checkpoints
from r0_jax.workdir.workdir import LocalWorkdir

RANK, ALPHA = 8, 4.0  # whose ratio is not 1
SIZE = 128  # pixels of a side
_SHARE = 0.3  # of a weight's size, that its adapter has
_STEP = 1


def make(family: Family, at: Places) -> None:
    """Write everything that clients are given."""
    shutil.rmtree(at.models, ignore_errors=True)
    at.models.mkdir(parents=True)
    folders.write_pipeline(at.pipeline, family.kind)
    single_file.write(at.pipeline, at.single)
    write_run(at.run, at.pipeline, family.targets, at.adapters)
    for form in family.formats:
        export(family, at, form)
    at.done.touch()


def export(family: Family, at: Places, form: str) -> None:
    """Export the run as a user does."""
    command = [sys.executable, "-m", "r0_jax.export", f"--workdir={at.run}", f"--format={form}"]
    command += [f"--out={at.export(form)}", f"--base_model={family.published}"]
    if form == "diffusers":
        command.append("--one_file")
    if (status := subprocess.run(command).returncode) != 0:
        raise InputError(f"{' '.join(command[1:])} ended with status {status}")


def write_run(workdir: Path, pretrained: Path, targets: str, adapters: Path) -> None:
    """Write the workdir of a run with random adapters; and these alone, to the file `adapters`.

    Its keys are MODULE.A and MODULE.B, in PyTorch's layout: a weight changes by B A.
    """
    workdir.mkdir()
    fields = config.get_config()
    fields.pretrained = str(pretrained)
    fields.data.prompts = "prompts.txt"
    fields.height = fields.width = SIZE
    fields.lora.rank, fields.lora.alpha, fields.lora.targets = RANK, ALPHA, targets
    (workdir / "config.json").write_text(json.dumps(fields.to_dict()), encoding="utf-8")
    pipeline = families.load(pretrained, text=False, images=False)
    shapes = pipeline.networks[pipeline.generator_part].shapes
    generator = Generator(RANK, ALPHA, targets)
    start = jax.eval_shape(lambda: generator.init(jax.random.key(0), {}, shapes))
    rng = np.random.default_rng(0)
    params: Params = {name: jnp.asarray(_draw(rng, name, x.shape)) for name, x in start.items()}
    state = train_state.init(params, optax.sgd(0.0))
    state = state._replace(step=jnp.int32(_STEP), ema_params=params)
    with Checkpoints(LocalWorkdir(workdir)) as checkpoints:
        checkpoints.save(state)
    found = {}
    for name, value in params.items():
        module, factor = name.removesuffix(".kernel").rsplit(".lora_", 1)
        scale = np.float32(generator.scale if factor == "B" else 1)
        value = convert.to_checkpoint(name, np.asarray(value)) * scale
        found[f"{module}.{factor}"] = np.ascontiguousarray(value)
    save_file(found, adapters)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw A with the size of a weight, and B so that scale A B has a share of it."""
    value = rng.standard_normal(shape, np.float32)
    if name.endswith(".lora_A.kernel"):
        return value / np.float32(math.sqrt(math.prod(shape[:-1])))
    return value * np.float32(_SHARE * RANK / ALPHA / math.sqrt(RANK))


def define_flags() -> None:
    flags.DEFINE_enum("family", None, list(FAMILIES), "which one", required=True)
    cli.define_path("folder", None, "of the family", required=True)


def main(argv: list[str]) -> None:
    del argv
    make(FAMILIES[flags.FLAGS.family], Places(Path(flags.FLAGS.folder)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
