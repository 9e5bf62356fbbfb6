"""What a config asks for is in the program that is put together from it."""

from unittest import mock

import jax
import numpy as np
import pytest
from dry_runs import cache  # noqa: F401 (a fixture)

from configs import sd15_r0
from r0_jax.models.repeat import Repeat
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.plan import weightless
from r0_jax.training import train
from r0_jax.workdir.checkpoint_manager import Checkpoints


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_training_starts_from_the_file_not_from_its_rounding(cache, dtype):  # noqa: F811
    config = sd15_r0.get_config("dryrun,full")
    config.dtype = dtype
    built = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1]))
    checkpoints = mock.create_autospec(Checkpoints, instance=True)
    start = train.restore_or_init(built, train.place_frozen(built), checkpoints, begun=False)
    whole = families.load(config.pretrained).params["unet"]
    assert start.state.params.keys() == whole.keys()
    for name, value in start.state.params.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, np.asarray(whole[name]), err_msg=name)


def test_the_size_of_images_is_the_configs(cache):  # noqa: F811
    config = sd15_r0.get_config("dryrun")
    config.height, config.width = 24, 8
    built = weightless.load(config, sharding.make_mesh({}, jax.devices()[:1]))
    assert built.pipeline.image_shape == built.objective.pipeline.image_shape == (24, 8, 3)
