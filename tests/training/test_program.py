"""What a config asks for is in the program that is put together from it."""

import jax
import pytest
from dry_runs import cache  # noqa: F401 (a fixture)

from configs import sd15_r0
from r0_jax.models.repeat import Repeat
from r0_jax.parallel import sharding
from r0_jax.plan import weightless


@pytest.mark.parametrize(
    "fields, sizes, expected",
    [
        ({}, (1, 1, 1), Repeat(scan=True, remat=True)),
        ({"remat": "calls", "scan_blocks": False}, (1, 1, 1), Repeat()),
        ({"remat": "none"}, (4, 1, 2), Repeat(scan=True)),
    ],
)
def test_blocks_are_compiled_as_the_config_says(cache, fields, sizes, expected):  # noqa: F811
    config = sd15_r0.get_config("dryrun")
    config.update(fields)
    mesh = sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)),
        jax.devices()[: sizes[0] * sizes[1] * sizes[2]],
    )
    assert weightless.load(config, mesh).objective.repeat == expected


def test_weights_that_are_split_are_gathered(cache):  # noqa: F811
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    built = weightless.load(sd15_r0.get_config("dryrun"), mesh)
    assert built.objective.repeat.gathered == sharding.replicated(mesh)


@pytest.mark.parametrize("remat, there", [("blocks", True), ("calls", True), ("none", False)])
def test_what_the_backward_pass_computes_again(cache, remat, there):  # noqa: F811
    config = sd15_r0.get_config("dryrun")
    config.remat = remat
    built = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1]))
    text = str(built.step.trace(*built.abstract).jaxpr)
    assert ("checkpoint[" in text or "remat" in text) is there
