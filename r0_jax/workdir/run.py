"""A workdir read back: its config, its pipeline, and the generator that it trained."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from ml_collections import ConfigDict

from r0_jax import config as base
from r0_jax import remote
from r0_jax.diffusion import grid
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.files import read_json
from r0_jax.method.generator import Generator
from r0_jax.pipelines import families
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.weights import lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.workdir import checkpoint
from r0_jax.workdir.workdir import Workdir

# Flat, by dotted name: adapters in NumPy, whole weights in the files of their checkpoint.
HostParams = dict[str, Shaped[np.ndarray, "..."] | Lazy]

# What readers of a run ask of its config.
_NEEDED = (
    "pretrained",
    "dtype",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "sampler.num_steps",
    "sampler.eta",
    "sampler.random_eta",
    "objective.method",
    "rewards",
    "heldout_rewards",
    "regularizers",
    "steps",
    "batch_size",
    "seed",
    "data.encoded",
    "attention",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished or running workdir.

    Attributes:
      config: the resolved one, as it was saved.
      pretrained: the folder that `pipeline` was loaded from.
      pipeline: in float32, so that adapters are merged in float32 whatever the run computed in.
      generator: as it was trained, computing in config.dtype.
      scheduler_config: for stock pipelines: `config.sampler.num_steps` steps of it visit the
        trained grid.
    """

    workdir: Workdir
    config: ConfigDict
    pretrained: Path
    pipeline: Pipeline
    generator: Generator
    scheduler_config: SchedulerConfig

    @property
    def left_out(self) -> list[str]:
        """Text encoders and tokenizers that the folder's index may name and the run did without:
        a stock pipeline has to be told that they are None."""
        there = self.pipeline.networks.keys() | self.pipeline.tokenizers.keys()
        if not self.pipeline.tokenizers:  # they were not asked for
            there |= {path.name for path in self.pretrained.iterdir() if path.is_dir()}
        return [
            name
            for name in read_json(self.pretrained / "model_index.json")
            if name.startswith(("text_encoder", "tokenizer")) and name not in there
        ]

    def params(self, step: int, ema: bool = True) -> HostParams:
        """The trainable parameters (adapters or all weights) of a checkpoint, in float32.

        Raises InputError where they are damaged or do not fit the pretrained pipeline.
        """
        field = "ema_params" if ema else "params"
        read = checkpoint.load_params if self.generator.rank else checkpoint.open_params
        params, _ = read(self.workdir, field, step)
        shapes = self.pipeline.networks[self.pipeline.generator_part].shapes
        expected = jax.eval_shape(
            lambda base: self.generator.init(jax.random.key(0), base, shapes), shapes
        )
        for name in sorted(expected.keys() | params.keys()):
            here, there = (x[name].shape if name in x else "absent" for x in (expected, params))
            if here != there:
                raise InputError(
                    f"{self.workdir.path} was trained on another pipeline than {self.pretrained}: "
                    f"{name} is {there} in the checkpoint and {here} there; give the one that it "
                    "was trained on with --pretrained=DIR"
                )
        return params

    def weights(self, params: HostParams, dtype: str | None = None) -> dict[str, Lazy]:
        """The network's weights in `dtype`, by default the config's; adapters are merged in
        float32, each when it is read."""
        generator = dataclasses.replace(self.generator, dtype="float32")
        base = self.pipeline.params[self.pipeline.generator_part]

        def value(name: str) -> np.ndarray:
            module = name.removesuffix(".kernel")
            own = (name, f"{module}.lora_A.kernel", f"{module}.lora_B.kernel")
            trained = {n: jnp.asarray(params[n]) for n in own if n in params}
            start = {} if name in trained else {name: jnp.asarray(base[name])}
            # Accelerators would round factors to bf16.
            with jax.default_matmul_precision("highest"):
                return np.asarray(generator.weights(trained, start)[name])

        # In the order in which checkpoints are read.
        return {
            name: lazy.computed(
                base[name].shape, dtype or self.generator.dtype, functools.partial(value, name)
            )
            for name in sorted(base)
        }


def open_run(
    workdir: Workdir, pretrained: str | os.PathLike | None = None, text: bool = True
) -> Run:
    """The run of a workdir.

    `pretrained` takes the place of the config's folder, where that one has moved; without `text`
    its text encoders need not be there. Raises
    InputError for a folder that is no workdir and for a pretrained pipeline that is not there or
    broken; `choose_step`, which is quick, says whether there is a checkpoint.
    """
    config = read_config(workdir.path)
    folder = find_pretrained(workdir.path, config, pretrained)
    pipeline = families.load(folder, text=text)
    scheduler_config = grid.exported(pipeline.scheduler_config, config.sampler.num_steps)
    adapter = config.lora
    generator = Generator(
        adapter.rank, adapter.alpha, adapter.targets, config.dtype, pipeline.fixed
    )
    return Run(workdir, config, folder, pipeline, generator, scheduler_config)


def find_pretrained(
    workdir: Path, config: ConfigDict, pretrained: str | os.PathLike | None = None
) -> Path:
    """The folder of the pretrained pipeline; InputError if the config's has moved."""
    folder = remote.local(pretrained or config.pretrained)
    if not folder.is_dir() and not pretrained:
        raise InputError(
            f"{folder}, the pretrained pipeline of {workdir}, is not there; say where "
            "it is now with --pretrained=DIR"
        )
    return folder


def read_config(workdir: Path) -> ConfigDict:
    """The resolved config of a run; InputError for a folder that is no workdir."""
    path = workdir / "config.json"
    if not workdir.is_dir():
        raise InputError(f"{workdir} is not a folder; give the --workdir of a run")
    if not path.is_file():
        raise InputError(f"{workdir} has no config.json, so it is not the --workdir of a run")
    try:
        # dict() is not for its copy: it refuses a list or a number.
        config = ConfigDict(dict(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path} is not the config of a run: bring the original back") from None
    default = base.get_config()
    for field in _NEEDED:
        value, expected = config, default
        for name in field.split("."):
            if not isinstance(value, ConfigDict) or name not in value:
                raise InputError(f"{path} has no {field}, so it is not the config of an R0 run")
            value, expected = value[name], expected[name]
        kinds = (int, float) if isinstance(expected, float) else type(expected)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(expected, bool):
            raise InputError(
                f"{path}: {field} = {value!r} is not the config of an R0 run: bring "
                "the original back"
            )
    return config


def choose_step(workdir: Workdir, step: str = "") -> int:
    """The step that a --step flag means: a number, "best", "latest", or "".

    Best is by the held-out reward; "" is the best where that was measured after training began,
    else the latest.
    Raises InputError for a folder without checkpoints and for a step that is not there.
    """
    read_config(workdir.path)
    if not checkpoint.steps(workdir):
        raise InputError(f"{workdir.path} has no checkpoint yet; wait for the first one of its run")
    if step in ("best", "latest"):
        return checkpoint.find_step(workdir, "best" if step == "best" else None)
    if step:
        if not step.isdecimal():
            raise InputError(f"--step={step}: expected the number of a step, best or latest")
        return checkpoint.find_step(workdir, int(step))
    # Step 0, the best of one, would be the base again.
    trained = any(checkpoint.scores(workdir))
    return checkpoint.find_step(workdir, "best" if trained else None)
