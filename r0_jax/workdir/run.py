"""Reads a workdir: its config, its pipeline, and the generator that it trained."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from ml_collections import ConfigDict
from numpy.typing import NDArray

from r0_jax import config as base
from r0_jax import remote
from r0_jax.diffusion import grid
from r0_jax.diffusion.scheduler_config import SchedulerConfig
from r0_jax.errors import InputError
from r0_jax.files import Json
from r0_jax.method import lora
from r0_jax.method.generator import Generator
from r0_jax.pipelines import families
from r0_jax.pipelines.folder import read_index
from r0_jax.pipelines.pipeline import Pipeline
from r0_jax.weights import lazy
from r0_jax.weights.lazy import Lazy
from r0_jax.weights.network import Params
from r0_jax.workdir import checkpoint, origin, sealed_json
from r0_jax.workdir.workdir import Workdir

# Flat, by dotted name: adapters in NumPy; whole weights stay in the files of their checkpoint.
HostParams = Mapping[str, Shaped[NDArray, "..."] | Lazy]

# Fields that readers of a run need in its config.
_NEEDED = (
    "pretrained",
    "dtype",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "sampler.num_steps",
    "sampler.eta",
    "sampler.random_eta",
    "sampler.guidance_scale",
    "objective.method",
    "rewards",
    "heldout_rewards",
    "regularizers",
    "steps",
    "batch_size",
    "seed",
    "data.prompts",
    "data.encoded",
    "attention",
)


_MOST = 1e18  # of a number in the config


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A workdir of a run, finished or not; its models are read when they are first asked for.

    Attributes:
      config: the resolved one, as it was saved.
      given_pretrained: the folder of the pretrained pipeline, where the config's has moved.
      text: whether the pipeline is read with its text encoders; None is as the run did.
    """

    workdir: Workdir
    config: ConfigDict
    given_pretrained: str | os.PathLike | None = None
    text: bool | None = None
    _metadata: dict[int, checkpoint.Metadata] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def pretrained(self) -> Path:
        """The folder of the pretrained pipeline; InputError if the config's has moved."""
        folder = remote.local(self.given_pretrained or self.config.pretrained)
        if not folder.is_dir() and not self.given_pretrained:
            raise InputError(
                f"{folder}, the pretrained pipeline of {self.workdir.path}, is not there; say "
                "where it is now with --pretrained=DIR"
            )
        return folder

    @functools.cached_property
    def index(self) -> Json:
        """The model_index.json of the pretrained pipeline; InputError if it is missing or broken.

        It is quick to read: nothing else of the pipeline is.
        """
        return read_index(self.pretrained)

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The pretrained pipeline; InputError if it is missing, broken or not what it was.

        It computes in float32, so that adapters are merged in float32 whatever the run did.
        """
        # What was trained on encoded prompts may never have had text encoders beside it.
        text = not self.config.data.encoded if self.text is None else self.text
        pipeline = families.load(self.pretrained, text=text)
        origin.check(self.workdir.path, pipeline, "give the original with --pretrained=DIR")
        # A run from before these fields was of the pretrained's size, which is what 0 means.
        return pipeline.sized(self.config.get("height", 0), self.config.get("width", 0))

    @functools.cached_property
    def generator(self) -> Generator:
        """The network as it was trained, which computes in config.dtype."""
        adapter = self.config.lora
        return Generator(
            adapter.rank, adapter.alpha, adapter.targets, self.config.dtype, self.pipeline.fixed
        )

    @functools.cached_property
    def scheduler_config(self) -> SchedulerConfig:
        """For stock pipelines: `config.sampler.num_steps` steps of it visit the trained grid."""
        sampler = self.config.sampler
        return grid.exported(self.pipeline.scheduler_config, sampler.num_steps, sampler.eta)

    @property
    def guidance(self) -> str:
        """How its steps are guided, in words that follow "4 steps"."""
        scale = self.config.sampler.guidance_scale
        return "without guidance" if scale == 1 else f"with guidance {scale:g}"

    @property
    def left_out(self) -> list[str]:
        """Text encoders and tokenizers that the folder's index may name and the run did without.

        A stock pipeline has to be told that they are None.
        """
        there = self.pipeline.networks.keys() | self.pipeline.tokenizers.keys()
        if not self.pipeline.tokenizers:  # they were not asked for
            there |= {path.name for path in self.pretrained.iterdir() if path.is_dir()}
        return [
            name
            for name in self.index
            if name.startswith(("text_encoder", "tokenizer")) and name not in there
        ]

    def choose_step(self, step: str = "") -> int:
        """Return the step that a --step flag means: a number, "best", "latest", or "".

        Best is by the held-out reward; "" is the best where that was measured after training
        began, else the latest. Raises InputError where there is no checkpoint, or not this one.
        """
        if not checkpoint.steps(self.workdir):
            raise InputError(
                f"{self.workdir.path} has no checkpoint yet; wait for the first one of its run"
            )
        if step in ("best", "latest"):
            return checkpoint.find_step(self.workdir, "best" if step == "best" else None)
        if step:
            if not step.isdecimal():
                raise InputError(f"--step={step}: expected the number of a step, best or latest")
            return checkpoint.find_step(self.workdir, int(step))
        scores = checkpoint.scores(self.workdir)
        # Step 0, the best of one, would be the base again.
        return checkpoint.best(scores) if any(scores) else checkpoint.find_step(self.workdir)

    def metrics(self, step: int) -> dict[str, float | None]:
        """Return what an evaluation measured of a checkpoint; {} if none did."""
        if step not in self._metadata:
            self._metadata[step] = checkpoint.read_metadata(self.workdir, step)
        return self._metadata[step]["metrics"]

    def params(self, step: int, ema: bool = True) -> HostParams:
        """Return the trained parameters (adapters or all weights) of a checkpoint, in float32.

        Raises InputError where they are damaged or do not fit the pretrained pipeline.
        """
        field: Literal["ema_params", "params"] = "ema_params" if ema else "params"
        params: HostParams
        if self.generator.rank:
            params, self._metadata[step] = checkpoint.load_params(self.workdir, field, step)
        else:
            params, self._metadata[step] = checkpoint.open_params(self.workdir, field, step)
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

    def weights(self, params: HostParams, dtype: str) -> Params:
        """Return the network's weights in `dtype`, for computing: adapters stay beside them."""
        generator = dataclasses.replace(self.generator, dtype=dtype)
        return generator.weights(dict(params), self.pipeline.params[self.pipeline.generator_part])

    def merged_weights(self, params: HostParams) -> dict[str, Lazy]:
        """Return the network's weights in float32, for files.

        Each adapter is merged when its weight is read.
        """
        base = self.pipeline.params[self.pipeline.generator_part]

        def value(name: str) -> NDArray:
            module = name.removesuffix(".kernel")
            factors = (f"{module}.lora_A.kernel", f"{module}.lora_B.kernel")
            if factors[0] not in params:
                return np.asarray(params[name] if name in params else base[name])
            start: Params = {name: jnp.asarray(base[name])}
            adapters: Params = {factor: jnp.asarray(params[factor]) for factor in factors}
            # Accelerators would round the factors to bf16.
            with jax.default_matmul_precision("highest"):
                return np.asarray(lora.merge(start, adapters, self.generator.scale)[name])

        # In the order in which checkpoints are read.
        return {
            name: lazy.computed(base[name].shape, "float32", functools.partial(value, name))
            for name in sorted(base)
        }


def open_run(
    workdir: Workdir, pretrained: str | os.PathLike | None = None, text: bool | None = None
) -> Run:
    """Open the run of a workdir; raise InputError for a folder that is not one.

    `pretrained` takes the place of the config's folder, where that one has moved. `text` says
    whether its text encoders are read; None is as the run did.
    """
    return Run(workdir, read_config(workdir.path), pretrained, text)


def read_config(workdir: Path) -> ConfigDict:
    """Read the resolved config of a run; raise InputError for a folder that is not a workdir."""
    path = workdir / "config.json"
    if not workdir.is_dir():
        raise InputError(f"{workdir} is not a folder; give the --workdir of a run")
    if not path.is_file():
        raise InputError(f"{workdir} has no config.json, so it is not the --workdir of a run")
    try:
        config = ConfigDict(sealed_json.loads_any(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is not the config of a run: bring the original back") from None
    default = base.get_config()
    for field in _NEEDED:
        value, expected = config, default
        for name in field.split("."):
            if not isinstance(value, ConfigDict) or name not in value:
                raise InputError(
                    f"{path} has no {field}: it is of an older version of r0_jax, or not of a run"
                )
            value, expected = value[name], expected[name]
        kinds = (int, float) if isinstance(expected, float) else type(expected)
        if (
            not isinstance(value, kinds)
            or isinstance(value, bool) != isinstance(expected, bool)
            or (isinstance(expected, int | float) and not abs(value) < _MOST)  # NaN is not
        ):
            raise InputError(
                f"{path}: {field} = {value!r} is not the config of an R0 run: bring "
                "the original back"
            )
    return config
