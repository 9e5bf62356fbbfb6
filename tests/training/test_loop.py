"""The loop, around a step that only counts."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r0_jax import config as base
from r0_jax.evaluation.validation import Validation
from r0_jax.method import train_state
from r0_jax.parallel import sharding
from r0_jax.parallel.stop_signal import Stopped, StopSignal
from r0_jax.training.loop import Job, Loop, Start
from r0_jax.training.program import Program
from r0_jax.workdir.checkpoint_manager import Checkpoints


class World:
    """A loop in `folder` and the `events` that its parts saw."""

    def __init__(self, folder, first=0, resumed=False, measured=False, placed=True, **fields):
        self.events, self.stop, self.placed = [], StopSignal(), placed
        self.config = base.get_config()
        self.config.steps, self.config.eval_every, self.config.checkpoint_every = 5, 100, 3
        self.config.tensorboard = False
        self.config.update(fields)
        self.mesh = sharding.make_mesh({"data": -1})
        program = mock.create_autospec(Program, instance=True)
        program.config, program.mesh, program.step = self.config, self.mesh, jax.jit(count)
        program.term_norms = jax.jit(lambda *arguments: {"norm/params/rewards": jnp.ones(())})
        self.checkpoints = mock.create_autospec(Checkpoints, instance=True)
        self.checkpoints.save.side_effect = lambda state: self.saw("save", int(state.step))
        self.checkpoints.add_metrics.side_effect = lambda step, values, score: self.saw("add", step)
        self.validation = mock.create_autospec(Validation, instance=True)
        self.validation.side_effect = self.validate
        state = train_state.init({"a.kernel": jnp.zeros(2)}, optax.sgd(1.0))
        state = state._replace(step=jnp.int32(first))
        state = jax.device_put(state, sharding.replicated(self.mesh))
        job = Job(program, {}, self.batches, self.validation, self.checkpoints, folder, self.stop)
        self.loop = Loop(job, Start(state, resumed, measured))
        write = self.loop.log.step
        self.loop.log.step = lambda step, *rest: (self.saw("log", step), write(step, *rest))

    def saw(self, what, step):
        self.events.append(f"{what} {step}")

    def batches(self, step):
        split = sharding.batch_sharding(self.mesh)
        while True:
            step += 1
            self.saw("step", step)
            rows = {"x": np.full(8, step, np.float32)}
            yield (
                sharding.put_batch(rows, split) if self.placed else jax.tree.map(jnp.asarray, rows)
            )

    def validate(self, params, step):
        self.saw("measure", step)
        return measured(float(step)), np.zeros((8, 8, 3), np.uint8)


def measured(x, vetoed=0.0):
    return {"heldout/x": x, "hacking/vetoed": vetoed}


def count(state, frozen, batch, key):
    metrics = {"train/loss": jnp.mean(batch["x"]) + 0 * jax.random.normal(key)}
    metrics["train/skipped_in_a_row"] = jnp.int32(0)
    return state._replace(step=state.step + 1), metrics


def test_the_rhythm(tmp_path):
    """A step is logged when the next one was started, or before it is saved.

    A measurement also looks at the batch that comes next.
    """
    world = World(tmp_path)
    assert world.loop.run()
    assert world.events == (
        "save 0,measure 0,step 1,add 0,step 2,log 1,step 3,log 2,log 3,save 3,"
        "step 4,step 5,log 4,log 5,save 5,measure 5,step 6,add 5"
    ).split(",")


def test_a_resumed_run_starts_after_its_checkpoint(tmp_path):
    world = World(tmp_path, first=3, resumed=True)
    assert world.loop.run()
    assert world.events[:3] == ["step 4", "step 5", "log 4"]
    assert int(world.loop.state.step) == 5


@pytest.mark.parametrize("measured", [True, False])
def test_a_checkpoint_that_was_not_measured_is_measured_again(tmp_path, measured):
    world = World(tmp_path, first=4, resumed=True, measured=measured, eval_every=2)
    assert world.loop.run()
    assert ("measure 4" in world.events) != measured


def test_a_signal_saves_and_ends_the_run(tmp_path):
    world = World(tmp_path)
    world.checkpoints.save.side_effect = lambda state: (
        world.saw("save", int(state.step)),
        setattr(world.stop, "came", int(state.step) == 3),
    )
    assert not world.loop.run()
    assert world.events[-3:] == ["log 3", "save 3", "save 3"]
    world.checkpoints.wait.assert_called_once_with()


def test_a_signal_in_a_measurement_leaves_it_undone(tmp_path):
    world = World(tmp_path, steps=1)
    world.validation.side_effect = Stopped
    assert world.loop.run()
    world.checkpoints.add_metrics.assert_not_called()


def test_no_new_best_ends_the_run(tmp_path):
    world = World(tmp_path, eval_every=1, best_metric="heldout/x", early_stop=2)
    world.validation.side_effect = lambda params, step: (
        measured(0.0),
        np.zeros((8, 8, 3), np.uint8),
    )
    assert world.loop.run()
    assert int(world.loop.state.step) == 2  # step 0 is the best


def test_what_is_vetoed_is_never_the_best(tmp_path):
    world = World(tmp_path, eval_every=1, best_metric="heldout/x", early_stop=2)
    world.validation.side_effect = lambda params, step: (
        measured(float(step), vetoed=float(step > 1)),
        np.zeros((8, 8, 3), np.uint8),
    )
    assert world.loop.run()
    assert int(world.loop.state.step) == 3  # step 1 is the best
    scores = [call.args[2] for call in world.checkpoints.add_metrics.call_args_list]
    np.testing.assert_array_equal(scores, [0, 1, np.nan, np.nan])


def test_a_transfer_that_nobody_wrote_down_is_an_error(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"Disallowed .*transfer"):
        World(tmp_path, placed=False).loop.run()
    world = World(tmp_path, placed=False)
    with world.config.unlocked():  # its callbacks run in this thread
        world.config.rewards.mine = base.reward_entry("function", function="module:name")
    assert world.loop.run()


def traces(folder):
    return [path.name for path in (folder / "tensorboard/plugins/profile").glob("*/*.xplane.pb")]


def test_a_profile_on_request(tmp_path):
    assert World(tmp_path / "none").loop.run() and not traces(tmp_path / "none")
    assert World(tmp_path / "some", profile=2).loop.run() and len(traces(tmp_path / "some")) == 1
    # More than the run has: the trace is of what there was.
    assert World(tmp_path / "all", profile=99).loop.run() and len(traces(tmp_path / "all")) == 1
