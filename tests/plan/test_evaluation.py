"""`plan` knows what evaluations and the table need beside the training step."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from dry_runs import cache  # noqa: F401 (a fixture)

from configs import sd15_r0
from r0_jax.evaluation import table_programs, testbed
from r0_jax.evaluation.validation import Validation
from r0_jax.parallel import sharding
from r0_jax.plan import measure, memory, need, stages, weightless
from r0_jax.plan.need import Compiled
from r0_jax.training import train
from r0_jax.training.program import Program
from r0_jax.weights import lazy

GIB = 2.0**30


@pytest.fixture(scope="module")
def built(cache, tmp_path_factory) -> Iterator[Program]:  # noqa: F811
    """A dry run on eight devices, which split its larger weights in halves."""
    config = sd15_r0.get_config("dryrun")
    config.batch_size, config.device_batch, config.draw_batch = 8, 1, 2
    config.eval.num_prompts = config.test.num_prompts = 16
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle\na green star\n" * 8, "utf-8")
    config.eval.prompts = config.test.prompts = str(prompts)
    config.test.features = "held_out"
    with config.unlocked():
        config.heldout_rewards.held_out = config.rewards.clip_score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_MIN_BYTES", 1000)
        yield weightless.load(config, sharding.make_mesh({"data": 4, "fsdp": 2}))


@pytest.fixture(scope="module")
def planned(built) -> dict[str, stages.Planned]:
    return {x.stage.name: x for x in stages.of_evaluations(built)}


class Recorded:
    """Stands for a jitted program: keeps what it would compile, and returns zeros."""

    def __init__(self, program):
        self.program, self.lowered = program, []

    def __call__(self, *arguments):
        self.lowered.append(self.program.lower(*arguments))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.lowered[-1].out_info)


def of_plan(planned):
    return planned.stage.run.lower(*planned.stage.arguments)


@pytest.fixture(scope="module")
def recorded(built, tmp_path_factory) -> dict[str, list[jax.stages.Lowered]]:
    """What a validation compiles, by the plan's names; it runs on real arrays."""
    frozen, heldout = train.place_frozen(built), weightless.load_heldout(built)
    rewards = [*built.objective.rewards, *heldout]
    validate = Validation(
        built.config,
        tmp_path_factory.mktemp("run"),
        built.pipeline,
        built.generator,
        built.source,
        rewards,
        frozen,
        {reward.name for reward in heldout},
        built.mesh,
        lambda: None,
    )
    programs = validate.programs
    found = {
        "drawing": Recorded(programs.sampler.run),
        "signs of hacking": Recorded(programs.look),
        **{f"reward {name}": Recorded(scorer) for name, scorer in programs.scores.items()},
    }
    programs.__dict__["look"] = found["signs of hacking"]
    programs.sampler.run = found["drawing"]
    programs.scores.update({name: found[f"reward {name}"] for name in programs.scores})
    state = jax.jit(built.init, out_shardings=built.state_sharding)(frozen["base"])
    validate(state.ema_params, 0)
    return {name: x.lowered for name, x in found.items()}


def test_the_programs_are_those_that_a_validation_compiles(planned, recorded):
    """From shapes and from arrays comes the same program: sizes, types and where things lie."""
    assert {x for x in planned if not x.startswith("table")} == recorded.keys()
    for name, lowered in recorded.items():
        assert {x.as_text() for x in lowered} == {of_plan(planned[name]).as_text()}, name
    held_out = planned["reward held_out"].stage.held["held-out held_out"]
    assert not all(x.sharding.is_fully_replicated for x in held_out.values())


def test_the_bytes_of_drawing_are_those_that_a_validation_needs(built, planned, recorded):
    drawing = planned["drawing"]
    found = recorded["drawing"][-1].compile().memory_analysis()
    own = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
    traced = drawing.stage.run.trace(*drawing.stage.arguments)
    compiled, _ = measure._compile(drawing, traced, 1.0)
    assert compiled.own_bytes == own and found.temp_size_in_bytes > 0
    # All that lies there is read or not; what comes beside it is the batch.
    lying = memory.bytes_by_kind(drawing.stage.held)
    batch = found.argument_size_in_bytes + compiled.beside_bytes - sum(lying.values())
    inputs = jax.tree.leaves(drawing.stage.arguments[1:3])
    assert 0 < batch <= sum(x.size * x.dtype.itemsize for x in inputs) + 8 * 16
    unread = ("parameters", "ema", "optimizer", "frozen clip_score")
    assert compiled.beside_bytes > sum(lying[kind] for kind in unread) > 0


def test_the_table_is_planned_as_it_is_made(built, planned, monkeypatch):
    """With the guided base, and whole weights on every device."""
    found = {}

    def scorers(rewards, mesh):
        made = {r.name: Recorded(sharding.spread(r.score, mesh)) for r in rewards}
        found.update({f"table: reward {name}": scorer for name, scorer in made.items()})
        return made

    encode = table_programs.image_features
    monkeypatch.setattr(testbed.programs, "scorers", scorers)
    monkeypatch.setattr(
        table_programs,
        "image_features",
        lambda *given: found.setdefault("table: image features", Recorded(encode(*given))),
    )
    config, mesh = built.config, sharding.global_mesh()
    guided = table_programs.samplers(config, built.pipeline, mesh).guided
    guided.run = found["table: drawing"] = Recorded(guided.run)
    params = lazy.place(built.pipeline.params, sharding.replicated(mesh), config.dtype)
    testbed.Testbed.build(config, built.pipeline).measure(testbed.Model(guided, params))
    assert {x for x in planned if x.startswith("table")} == found.keys()
    for name, program in found.items():
        assert {x.as_text() for x in program.lowered} == {of_plan(planned[name]).as_text()}, name


def of(planned, own, code=0.0, beside=0.0, ran_out=False) -> Compiled:
    return Compiled(planned, own, code, beside, ran_out, 1.0)


def test_a_run_whose_drawing_does_not_fit_does_not_fit(built, planned):
    step = stages.of_training_step(built)
    drawing = planned["drawing"]
    found = need.total([of(step, 6 * GIB), of(drawing, 8 * GIB, beside=3 * GIB)], 10 * GIB)
    assert [(x.program, x.fits, x.peak_bytes) for x in found.needs] == [
        ("training step", True, 6 * GIB),
        ("drawing", False, 11 * GIB),
    ]
    assert not found.memory.fits and found.memory.program == "drawing"
    assert found.memory.peak_bytes == 11 * GIB == pytest.approx(sum(found.memory.by_kind.values()))
    assert found.suggestions[0].startswith("--config.draw_batch=1: 5.5 GiB of 1.0")
    assert not any("device_batch" in line or "decoder" in line for line in found.suggestions)
    fits = need.total([of(step, 6 * GIB), of(drawing, 8 * GIB, beside=2 * GIB)], 10 * GIB)
    assert fits.memory.fits and not fits.suggestions
    ran_out = need.total([of(step, 6 * GIB), of(drawing, 8 * GIB, ran_out=True)], 10 * GIB)
    assert not ran_out.memory.fits


def test_programs_of_one_phase_stay_loaded_together(built, planned):
    """Their code takes room while another one runs; the table is made when the others are gone."""
    programs = [
        of(stages.of_training_step(built), 5 * GIB, code=1 * GIB),
        of(planned["drawing"], 2 * GIB, code=2 * GIB),
        of(planned["table: drawing"], 6 * GIB, code=0.5 * GIB),
    ]
    found = need.total(programs, 10 * GIB)
    assert [x.peak_bytes / GIB for x in found.needs] == [8.0, 5.0, 6.5]
    assert found.memory.by_kind["code"] == 3 * GIB


def test_what_is_suggested_for_each_program(built):
    """What it is that does not fit decides."""
    built.config.eval.term_norms = True
    planned = {x.stage.name: x for x in stages.of_evaluations(built)}
    built.config.eval.term_norms = False

    def first(name):
        return need.total([of(planned[name], 2 * GIB)], GIB).suggestions

    assert first("term norms")[0] == "--config.eval.term_norms=False"
    assert "no reward held-out pickscore: 0.0 GiB of 1.0" in first("reward pickscore")
    assert not any("no reward" in line for line in first("reward clip_score"))
    assert "r0_jax.evaluate" in first("table: drawing")[-1]
