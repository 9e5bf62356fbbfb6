"""Every program that a run compiles, with what lies on a chip while it runs."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from r0_jax.evaluation import table_programs
from r0_jax.evaluation.programs import Programs, Stage
from r0_jax.parallel import sharding
from r0_jax.plan import memory, suggestions, weightless
from r0_jax.training.program import Program

STEP = "training step"


class Planned(NamedTuple):
    """A program, and what helps where it does not fit.

    Attributes:
      suggest: (bytes of a chip by kind, how many are too many) -> suggestions.
      loaded_with: the phase of the run; programs of one phase stay loaded together.
    """

    stage: Stage
    suggest: Callable[[dict[str, float], float], list[str]]
    loaded_with: str


def of_training_step(built: Program) -> Planned:
    """Return the training step."""
    held = memory.held(built) | {"batch": built.abstract[2]}
    return Planned(
        Stage(STEP, built.step, built.abstract, held),
        lambda kinds, over: suggestions.for_step(built, kinds, over),
        "training",
    )


def of_evaluations(built: Program) -> Iterator[Planned]:
    """Yield what evaluations run beside the state, and what the table at the end runs."""
    config, heldout = built.config, weightless.load_heldout(built)
    rewards = [*built.objective.rewards, *heldout]
    columns = built.source.columns(built.pipeline, rewards)
    lying = memory.held(built)
    programs = Programs(
        config,
        built.pipeline,
        built.generator,
        rewards,
        built.abstract_frozen,
        built.mesh,
        config.eval.num_prompts,
    )
    for stage in programs.stages(built.abstract_state.ema_params, columns):
        yield Planned(
            stage._replace(held=lying | stage.held),
            lambda kinds, over: suggestions.for_evaluation(built, kinds, over, programs.batch),
            "training",
        )
    if config.eval.term_norms:
        held = lying | {"batch": built.abstract[2]}
        yield Planned(
            Stage("term norms", built.term_norms, built.abstract, held),
            lambda kinds, over: suggestions.for_term_norms(built, kinds, over),
            "training",
        )
    if config.test.prompts:
        mesh = sharding.make_mesh({"data": -1}, list(built.mesh.devices.flat))
        for stage in table_programs.stages(config, built.pipeline, rewards, columns, mesh):
            yield Planned(
                stage,
                lambda kinds, over: suggestions.for_table(built, kinds, over),
                "table",
            )
