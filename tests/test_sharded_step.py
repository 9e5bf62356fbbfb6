"""The step of real networks, in miniature, is the same on any mesh: everything that it holds is
split, and losses, gradients and parameters are those of one device."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from dry_runs import cache  # noqa: F401 (a fixture)
from step_world import FAST, assert_close

from configs import sd3_r0, sd15_r0
from r0_jax import optim, prompt_dataset, sharding, train, train_state
from r0_jax.generator import Generator
from r0_jax.miniature import PROMPTS
from r0_jax.objective import Objective
from r0_jax.pipelines import families
from r0_jax.train_step import make_train_step

RECIPES = {"sd15": sd15_r0, "sd3": sd3_r0}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
KEY = jax.random.key(7)


class Job(NamedTuple):
    """What the loop has before its first step, but for the mesh."""

    config: Any
    pipeline: Any
    rewards: list
    batch: dict[str, np.ndarray]

    def two_steps(self, mesh):
        """(frozen, the state before, [(state, metrics) after each step])."""
        config, pipeline, rewards, batch = self
        network = pipeline.networks[pipeline.generator_part]
        generator = Generator(config.lora.rank, config.lora.alpha, config.lora.targets,
                              config.dtype, pipeline.fixed)
        objective = Objective(pipeline, generator, rewards, config)
        optimizer = optim.make_optimizer(config)
        frozen = train.place_frozen(pipeline, rewards, None, mesh, config)

        def init(base):
            params = generator.init(KEY, base, network.shapes)
            return train_state.init(params, optimizer)

        specs = sharding.state_sharding(jax.eval_shape(init, frozen["base"]), mesh,
                                        config.sharding, network.heads)
        state = before = jax.jit(init, out_shardings=specs)(frozen["base"])
        step = jax.jit(make_train_step(objective, optimizer, config, mesh),
                       out_shardings=(specs, sharding.replicated(mesh)), compiler_options=FAST)
        found = []
        for _ in range(2):
            state, metrics = step(state, frozen,
                                  sharding.put_batch(batch, sharding.batch_sharding(mesh)), KEY)
            found.append((state, metrics))
        return frozen, before, found


@pytest.fixture(scope="module", params=RECIPES)
def job(request, cache):  # noqa: F811
    config = RECIPES[request.param].get_config("dryrun,full,r0plus")
    # Adam's update is the gradient itself: see step_world.
    config.update_from_flattened_dict({
        "sampler.num_steps": 2, "batch_size": 8, "accumulation": 1, "optimizer.warmup_steps": 0,
        "optimizer.eps": 100.0, "optimizer.learning_rate": 100.0})
    with config.unlocked():  # one reward will do
        config.rewards = {"hps_v2_1": config.rewards.hps_v2_1}
    pipeline = families.load(config.pretrained, config.dtype, config.family)
    rewards = train.load_rewards(config.rewards, pipeline, config, None, trained=True)
    prompts = (PROMPTS * 8)[:8]
    batch = pipeline.tokenize(prompts) | prompt_dataset.features(prompts, rewards)
    return Job(config, pipeline, rewards, batch)


@pytest.fixture(scope="module")
def expected(job):
    return job.two_steps(sharding.make_mesh({}, jax.devices()[:1]))[2]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_two_steps_on_any_mesh_equal_those_of_one_device(job, expected, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_BYTES", 0)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    frozen, before, found = job.two_steps(mesh)
    for (state, metrics), (one_state, one_metrics) in zip(found, expected, strict=True):
        assert_close(metrics, one_metrics)
        assert_close(state, one_state)
