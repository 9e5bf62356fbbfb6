"""The step of real networks is the same on any mesh: all that it holds is split, and losses,
gradients and parameters are those of one device."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import step_world
from dry_runs import cache  # noqa: F401 (a fixture)
from step_world import assert_close

from configs import sd3_r0
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.prompts import prepared
from r0_jax.prompts.text import TextPrompts
from r0_jax.stand_ins.miniature_tokenizer import PROMPTS
from r0_jax.training import pretrained, program
from r0_jax.weights import lazy

# Adam's first updates are the gradients themselves: see step_world.
SETTINGS = {
    "sampler.num_steps": 1,
    "objective.method": "r0",
    "objective.grad_steps": 1,
    "lora.rank": 0,
    "regularizers.weight.weight": 0.1,
    "batch_size": 8,
    "optimizer.warmup_steps": 0,
    "optimizer.eps": 100.0,
    "optimizer.learning_rate": 100.0,
}
KEY = jax.random.key(7)

# A mesh -> the frozen weights, the state, and (state, frozen) -> (state, metrics).
Start = Callable[[Any], tuple[dict[str, Any], Any, Callable]]


def of_unet() -> Start:
    """UNet, VAE and CLIP, of channels that 8 devices divide."""
    world = step_world.make(SETTINGS, toy=None, width=8)

    def start(mesh):
        run, state, _ = world.step(mesh)
        frozen = step_world.place(world.frozen, mesh, world.config)
        return frozen, state, lambda state, frozen: run(state, step_world.batch(8), KEY)

    return start


def of_mmdit_and_t5() -> Start:
    """Stable Diffusion 3 in miniature, as the loop starts it, and HPS."""
    config = sd3_r0.get_config("dryrun")
    config.update_from_flattened_dict({**SETTINGS, "regularizers.guidance.weight": 0.0})
    with config.unlocked():  # one reward will do
        config.rewards = {"hps_v2_1": config.rewards.hps_v2_1}
    pipeline = families.load(config.pretrained, config.dtype, config.family)
    source = TextPrompts()
    rewards = pretrained.load_rewards(config.rewards, pipeline, config, source, trained=True)
    prompts = (PROMPTS * 8)[:8]
    batch = pipeline.tokenize(prompts) | prepared.features({"prompt": prompts}, rewards)

    def start(mesh):
        built = program.build(config, mesh, pipeline, rewards, source)
        frozen = lazy.place(built.frozen, built.frozen_sharding)
        state = jax.jit(built.init, out_shardings=built.state_sharding)(frozen["base"])
        # As `built.step`, which gives the state's memory away and compiles longer.
        step = jax.jit(
            program.step_on(mesh, built.objective, built.optimizer, config),
            out_shardings=(built.state_sharding, sharding.replicated(mesh)),
        )
        put = sharding.put_batch(batch, sharding.batch_sharding(mesh))
        return frozen, state, lambda state, frozen: step(state, frozen, put, KEY)

    return start


@pytest.fixture(scope="module", params=[of_unet, of_mmdit_and_t5])
def world(request, cache):  # noqa: F811
    """What starts on a mesh; whether its networks split over tensor; two steps on one device."""
    start = request.param()
    return (
        start,
        request.param is of_mmdit_and_t5,
        two_steps(start, sharding.make_mesh({}, jax.devices()[:1]))[2],
    )


def two_steps(start: Start, mesh):
    frozen, before, step = start(mesh)
    first, metrics = step(before, frozen)
    return frozen, before, [(first, metrics), step(first, frozen)]


# The batch is split over data and fsdp alike.
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_two_steps_on_any_mesh_equal_those_of_one_device(world, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_BYTES", 0)
    start, has_tensor, expected = world
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    frozen, before, found = two_steps(start, mesh)
    for one, (state, metrics) in zip(expected, found, strict=True):
        for part in ("params", "ema_params"):
            assert_close(getattr(state, part), getattr(one[0], part))
        for name, value in metrics.items():  # of cosines 1e-5 of 1, of <pull, x0> of their norms
            least = {"cosine": 1.0, "train": 3.0}.get(name.split("/")[0], 0.0)
            np.testing.assert_allclose(
                value, one[1][name], rtol=1e-5, atol=1e-5 * least, err_msg=name
            )
        # Squares of gradients as small as 1e-6, on processors of all kinds.
        assert_close(state.opt_state, one[0].opt_state, 3e-4)
        # Nothing is left where it was computed, nor of another kind than it was.
        assert list(map(kind, jax.tree.leaves(state))) == list(map(kind, jax.tree.leaves(before)))

    _, fsdp, tensor = sizes
    trees = {
        "params": before.params,
        "ema": before.ema_params,
        "moments": jax.tree.leaves(before.opt_state),
        **{name: tree for name, tree in frozen.items() if name not in ("empty", "rewards")},
        **{f"reward {name}": tree for name, tree in frozen["rewards"].items()},
    }
    for name, tree in trees.items():
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 64]  # not toys' vectors
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        share = held / max(1, sum(leaf.nbytes for leaf in leaves))
        assert share <= 1.1 / fsdp, name  # some have no axis that divides
        if (
            tensor > 1
            and has_tensor
            and name in ("params", "ema", "moments", "base", "text_encoder_3")
        ):
            assert share <= 0.8 / fsdp, name


def kind(leaf: jax.Array):
    return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
