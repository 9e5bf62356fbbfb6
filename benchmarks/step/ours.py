"""The step of the package, as `r0_jax.main` runs it: python -m benchmarks.step.ours FOLDER.

It reads FOLDER/config.json, and writes what a twin needs to FOLDER/inputs.npz.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from benchmarks.step import draws, turns
from benchmarks.step.turns import First
from r0_jax import prompts
from r0_jax.files import read_json
from r0_jax.method import optim
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.plan import flops, jaxpr_cost
from r0_jax.prompts.files import read_prompts
from r0_jax.training import host_memory, pretrained, program
from r0_jax.weights import convert, lazy, tensor_file
from r0_jax.weights.tensor_file import Tensor

INPUTS, GRADIENT = "inputs.npz", "gradient.safetensors"  # in the folder


class Ours:
    """The package's train step, of prompts that are encoded before.

    Every step is of the first `config.batch_size` prompts. Noise differs from step to step.
    """

    def __init__(self, config: ConfigDict, folder: Path):
        """Load what `config` names; write what a twin needs to the folder."""
        self.config, self.folder = config, folder
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        texts = read_prompts(config.data.prompts, count=config.batch_size)
        loaded = pretrained.load(config)
        encoded = encode(loaded.pipeline, [*texts, ""])
        rows = {name: value[:-1] for name, value in encoded.items()}
        pipeline = dataclasses.replace(
            families.load(config.pretrained, config.dtype, config.family, text=False),
            negative={name: value[-1:] for name, value in encoded.items()},
            size=loaded.pipeline.size,
        )
        for reward in loaded.rewards:
            if reward.text_features is not None:
                rows[reward.column] = reward.text_features(reward.params, texts)
        self.built = program.build(config, mesh, pipeline, loaded.rewards, prompts.of(config))
        self.frozen = lazy.place(self.built.frozen, self.built.frozen_sharding)
        self.batch = sharding.put_batch(rows, sharding.batch_sharding(mesh))
        self.key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
        self.state = jax.jit(self.built.init, out_shardings=self.built.state_sharding)(
            self.frozen["base"]
        )
        np.savez(folder / INPUTS, **self.inputs())

    def inputs(self) -> dict[str, np.ndarray]:
        """Return the batch, what the first step draws, and what all steps of a run go by."""
        program, count = self.built, self.config.steps
        drawn = self.state, self.batch, self.key
        rate = optim.learning_rate_schedule(self.config)
        return {
            **{name: np.asarray(value) for name, value in self.batch.items()},
            **{f"empty/{name}": np.asarray(x) for name, x in self.frozen["empty"].items()},
            **draws.of_step(program, *drawn),
            "last": draws.last_calls(program, *drawn, count),
            "rate": np.asarray([rate(n) for n in range(count)], np.float32),
        }

    def first(self) -> First:
        """Compile, take the first step and write its gradient."""
        arguments = self.state, self.frozen, self.batch, self.key
        begin = time.perf_counter()
        traced = self.built.step.trace(*arguments)
        self.step = traced.lower().compile()
        host_memory.give_back()  # as the training does
        self.state, metrics = jax.block_until_ready(self.step(*arguments))
        seconds = time.perf_counter() - begin
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._write_gradient(found["norm/grads"])
        trips = flops.expected_trips(self.config)
        return First(found, GRADIENT, seconds, jaxpr_cost.flops(traced.jaxpr.jaxpr, trips))

    def run(self, begin: int, steps: int) -> float:
        """Take steps from number `begin` on; return their seconds."""
        number = jax.device_put(np.int32(begin), self.built.state_sharding.step)
        self.state = jax.block_until_ready(self.state._replace(step=number))
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.frozen, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def _write_gradient(self, norm: float) -> None:
        """Write the gradient of the first step, which Adam's first moment still holds."""
        c = self.config.optimizer
        scale = max(1.0, norm / c.clip_norm) / (1 - c.b1)
        moment = optax.tree_utils.tree_get(self.state.opt_state, "mu")
        found = {
            convert.to_key(name): convert.to_checkpoint(name, scale * np.asarray(value))
            for name, value in moment.items()
        }
        tensor_file.write(
            self.folder / GRADIENT,
            [Tensor(key, x.shape, x.dtype, lambda x=x: x) for key, x in found.items()],
        )


def encode(pipeline: Any, texts: list[str]) -> dict[str, np.ndarray]:
    """Return what the pipeline's text encoders make of prompts."""
    parts = {part: x for part, x in pipeline.params.items() if part.startswith("text_encoder")}
    told = jax.jit(pipeline.encode_text)(lazy.place(parts), pipeline.tokenize(texts))
    return {name: np.asarray(value) for name, value in told.items()}


def main() -> None:
    folder, answers = Path(sys.argv[1]), turns.take_stdout()
    turns.serve(Ours(ConfigDict(read_json(folder / "config.json")), folder), answers)


if __name__ == "__main__":
    main()
