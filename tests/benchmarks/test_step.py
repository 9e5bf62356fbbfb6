"""The train step here and its twin in PyTorch, on miniatures."""

import math

import jax
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.step import __main__ as step
from benchmarks.step import agreement, report
from benchmarks.step.agreement import Agreement
from benchmarks.step.ours import INPUTS, Ours
from benchmarks.step.report import Pair, Timing
from benchmarks.step.turns import First
from benchmarks.step.twin import Twin
from benchmarks.step.variants import VARIANTS
from r0_jax import config as base
from r0_jax.stand_ins import miniature, miniature_reward
from r0_jax.weights import convert


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """(our first step, variant -> the twin before it, the folder)

    The generator has left the base, so that every term pulls.
    """
    folder = tmp_path_factory.mktemp("step")
    miniature.write(folder / "pipeline", "StableDiffusionPipeline")
    miniature_reward.write_reward(folder / "clip", "clip_score")
    (folder / "prompts.txt").write_text("red\nblue\n")
    config = step.configure("r0", batch=2, steps=3)
    config.pretrained = str(folder / "pipeline")
    config.data.prompts = str(folder / "prompts.txt")
    config.sampler.num_steps = config.objective.grad_steps = 2
    config.objective.unroll = False  # compiles in half the time
    with config.unlocked():
        del config.rewards.preference
        config.rewards.clip_score = base.reward_entry("clip_score", path=str(folder / "clip"))
    torch.set_num_threads(1)
    ours, rng = Ours(config, folder), np.random.default_rng(0)
    moved = {
        name: np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32)
        for name, x in ours.state.params.items()
    }
    state = ours.state._replace(params=moved)
    ours.state = jax.device_put(state, ours.built.state_sharding)

    def twin(variant):
        made = Twin(config, folder, INPUTS, VARIANTS[variant])
        made.unet.load_state_dict(
            {
                convert.to_key(name): torch.tensor(convert.to_checkpoint(name, x))
                for name, x in moved.items()
            }
        )
        return made

    first = ours.first()
    assert ours.run(1, 1) > 0
    return first, twin, folder


def test_the_twin_takes_the_same_first_step(sides):
    ours, make, folder = sides
    twin = make("eager+channels_last")
    found = agreement.compare(ours, twin.first(), folder)
    assert found.holds, found
    assert {"train/loss", "norm/grads", "norm/reward_grads/clip_score"} < set(found.apart)
    for term in ("output", "guidance"):
        assert ours.metrics[f"norm/x0/{term}"] > 0.01
        assert f"norm/x0/{term}" in found.apart
    assert ours.flops > 0
    assert twin.run(1, 1) > 0


class Faded(torch.autograd.Function):
    """What passes forward as it is, and whose gradient loses its left side on the way back."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.linspace(0, 1, gradient.shape[-1])


class WrongGradient(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *given):
        return Faded.apply(self.decoder(*given))


def test_a_wrong_gradient_of_the_decoder_is_told(sides):
    ours, make, folder = sides
    twin = make("eager")
    twin.vae.decoder = WrongGradient(twin.vae.decoder)
    found = agreement.compare(ours, twin.first(), folder)
    assert not found.holds
    assert found.apart["reward/clip_score"] < 1e-4  # what it draws is right
    assert found.apart[agreement.GRADIENT] > 0.01


def test_what_is_missing_or_not_a_number_differs():
    assert agreement.distance({"a": np.ones(2)}, {"a": np.ones(2)}) == 0
    assert agreement.distance({"a": np.ones(2)}, {"a": np.full(2, np.nan)}) == math.inf
    assert agreement.distance({"a": np.ones(2)}, {}) == math.inf
    assert not Agreement({"norm/grads": math.inf}).holds


def test_a_row_has_a_ratio_only_where_the_first_steps_agree():
    first = First({}, "", 3.0, flops=1e9)
    here = Timing(first, [1.0, 2.0, 4.0], 10**9, 10**9)
    there = here._replace(seconds=[3.0, 5.0, 6.0])
    right = Pair("eager", here, there, Agreement({"gradient": 1e-5}))
    wrong = Pair(
        "compile",
        here._replace(seconds=[]),
        there._replace(seconds=[]),
        Agreement({"gradient": 0.5}),
    )
    ours, eager, compiled = report.rows([right, wrong], batch=8)
    assert ours[:4] == ["r0_jax", "2.000", "4.0", "1"]
    assert eager[:4] == ["PyTorch, eager", "5.000", "1.6", "2.50"]
    assert compiled[1:4] == ["", "", "none"] and compiled[-1] == "**5e-01, gradient**"
    config = step.configure("r0plus", batch=8, steps=3)
    told = report.text([right, wrong], ["aot_eager"], config, "a recipe", rounds=3, steps=1)
    assert "compile: gradient is 50.0% off, so it is not timed." in told
    assert "aot_eager: ended with an error." in told
