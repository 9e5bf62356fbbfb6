import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from published import config_of

from r0_jax import config as base
from r0_jax.errors import InputError
from r0_jax.method import train_state
from r0_jax.parallel import sharding
from r0_jax.pipelines.folder import NETWORKS
from r0_jax.weights.network import Network

RULES = [(".*", "fsdp")]


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"data": -1}, (8, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"tensor": 8}, (1, 1, 8)),
    ],
)
def test_mesh_takes_all_devices(shape, sizes):
    mesh = sharding.make_mesh(shape)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_over_given_devices():
    assert (
        list(sharding.make_mesh({"data": -1}, jax.devices()[:2]).devices.flat) == jax.devices()[:2]
    )


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"data": 3, "fsdp": -1}, "data=3 x fsdp=-1 x tensor=1 does not fit 8 device"),
        ({"data": 2, "fsdp": 2}, "data=2 x fsdp=2 x tensor=1 does not fit 8 device"),
        ({}, "data=1 x fsdp=1 x tensor=1 does not fit 8 device"),
        ({"data": 16}, "data=16 x fsdp=1 x tensor=1 does not fit 8 device"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"data": 0}, "at least 1"),
        ({"data": -1, "tensor": 3}, "others to divisors of 8"),
        ({"data": -1, "model": 2}, "no axis 'model'; its axes are data, fsdp and tensor"),
    ],
)
def test_mesh_that_does_not_fit(shape, said):
    with pytest.raises(InputError, match=said):
        sharding.make_mesh(shape)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU that is not there, as `jax.devices()` shows it."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


def chips(slices, rows=2, columns=4):
    """Slices of rows x columns chips, four of them a host."""
    per = rows * columns
    return [
        Chip(i, i // per, i // 4, (i % per % rows, i % per // rows, 0)) for i in range(slices * per)
    ]


def gpus(hosts_of_two):
    return [
        dataclasses.replace(chip, platform="gpu", device_kind="H100")
        for chip in chips(hosts_of_two)
    ]


@pytest.mark.parametrize(
    "shape", [{"fsdp": -1}, {"data": 2, "fsdp": 4, "tensor": 2}, {"data": 8, "tensor": 2}]
)
def test_one_slice_of_4_x_4_chips_takes_any_mesh_of_16(shape):
    """Also where an axis of the mesh is a part of a physical one."""
    slice_ = chips(1, rows=4)
    assert set(sharding.make_mesh(shape, slice_).devices.flat) == set(slice_)


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ({"data": -1}, (16, 1, 1)),
        ({"data": -1, "fsdp": 8}, (2, 8, 1)),
        ({"data": 4, "fsdp": 2, "tensor": 2}, (4, 2, 2)),
    ],
)
def test_slices_follow_each_other_on_the_data_axis(shape, sizes):
    mesh = sharding.make_mesh(shape, chips(2)[::-1])  # in whatever order they come
    assert mesh.devices.shape == sizes and set(mesh.devices.flat) == set(chips(2))
    first, second = np.split(mesh.devices, 2)
    assert {chip.slice_index for chip in first.flat} == {0}
    assert {chip.slice_index for chip in second.flat} == {1}


@pytest.mark.parametrize("shape", [{"fsdp": -1}, {"data": 1, "fsdp": 8, "tensor": 2}])
def test_a_mesh_whose_weights_would_be_split_over_slices(shape):
    with pytest.raises(InputError, match=r"does not fit 2 slices of 8 chips: .*set data to -1"):
        sharding.make_mesh(shape, chips(2))


def test_gpus_of_several_hosts_split_weights_over_them():
    """JAX gives GPUs a slice_index too, of what NVLink joins."""
    assert sharding.make_mesh({"fsdp": -1}, gpus(2)).devices.shape == (1, 16, 1)


def test_fsdp_splits_the_largest_divisible_axis_of_what_is_large():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    shapes = {
        "wide.kernel": struct(640, 5120),
        "tall.kernel": struct(5120, 640),
        "odd.kernel": struct(640, 5121),  # the largest axis does not divide
        "prime.kernel": struct(1031, 1033),
        "conv.kernel": struct(3, 3, 640, 640),
        "small.kernel": struct(1024, 1024),  # 4 MB: not over it
        "small_enough.kernel": struct(1024, 1025),
        "half.kernel": struct(1024, 2048, dtype=jnp.bfloat16),  # 4 MB too
        "blocks.*.kernel": struct(8192, 64, 64),  # scanned over its first axis
    }
    specs = {n: s.spec for n, s in sharding.param_sharding(shapes, mesh, RULES).items()}
    assert specs == {
        "wide.kernel": PartitionSpec(None, "fsdp"),
        "tall.kernel": PartitionSpec("fsdp"),
        "odd.kernel": PartitionSpec("fsdp"),
        "prime.kernel": PartitionSpec(),
        "conv.kernel": PartitionSpec(None, None, "fsdp"),
        "small.kernel": PartitionSpec(),
        "small_enough.kernel": PartitionSpec("fsdp"),
        "half.kernel": PartitionSpec(),
        "blocks.*.kernel": PartitionSpec(None, "fsdp"),
    }


def test_tensor_splits_outputs_and_inputs_and_fsdp_the_other_axis():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shapes = {
        "attn.to_q.kernel": struct(2048, 4096),
        "attn.to_q.bias": struct(4096),
        "attn.to_out.0.kernel": struct(4096, 2048),
        "attn.to_out.0.bias": struct(2048),
        "odd.to_q.kernel": struct(2048, 4096),  # of three heads
        "ff.to_q.kernel": struct(2048, 4095),
        "small.to_q.kernel": struct(2, 4),
        "blocks.*.to_q.kernel": struct(24, 2048, 4096),
        "blocks.*.to_out.0.kernel": struct(24, 4096, 2048),
        "conv.to_q.kernel": struct(3, 3, 512, 512),
    }
    rules = [(r".*to_q\..*", "column"), (r".*to_out\.0\.kernel", "row"), (".*", "fsdp")]
    found = sharding.param_sharding(shapes, mesh, rules, {"attn": 4, "odd": 3})
    assert {name: tuple(s.spec) for name, s in found.items()} == {
        "attn.to_q.kernel": ("fsdp", "tensor"),
        "attn.to_q.bias": ("tensor",),
        "attn.to_out.0.kernel": ("tensor", "fsdp"),
        "attn.to_out.0.bias": (),
        "odd.to_q.kernel": (None, "fsdp"),
        "ff.to_q.kernel": ("fsdp",),
        "small.to_q.kernel": (None, "tensor"),
        "blocks.*.to_q.kernel": (None, "fsdp", "tensor"),
        "blocks.*.to_out.0.kernel": (None, "tensor", "fsdp"),
        "conv.to_q.kernel": (None, None, "fsdp", "tensor"),
    }


def network_of(name):
    fields = config_of(name)
    build, _ = NETWORKS[fields.get("_class_name") or fields["architectures"][0]]
    return Network.abstract(lambda rngs: build(fields, rngs))


@pytest.mark.parametrize(
    "name, tensor, split",
    [
        ("stable_diffusion_3/transformer", 4, 0.62),
        ("stable_diffusion_3/transformer", 5, 0),
        ("stable_diffusion_3/text_encoder_3", 4, 0.97),
        ("z_image/transformer", 5, 0.95),
        ("z_image/text_encoder", 8, 0.9),
        ("stable_diffusion/unet", 4, 0),
        ("stable_diffusion_3/vae", 4, 0),
        ("stable_diffusion/text_encoder", 4, 0),
    ],
)
def test_the_configs_rules_split_the_attention_of_transformers(name, tensor, split):
    """`split`: the share of weights. What the heads do not divide is as without tensor."""
    network, rules = network_of(name), base.get_config().sharding
    devices = jax.devices()[:tensor]
    found, plain = (
        {
            name: s.spec
            for name, s in sharding.param_sharding(
                network.shapes, sharding.make_mesh(shape, devices), some, network.heads
            ).items()
        }
        for shape, some in [({"tensor": tensor}, rules), ({"fsdp": tensor}, [(".*", "fsdp")])]
    )
    sizes = {name: np.prod(shape.shape) for name, shape in network.shapes.items()}
    halved = [name for name, spec in found.items() if "tensor" in spec]
    assert sum(sizes[name] for name in halved) >= split * sum(sizes.values())
    if not split:
        assert not halved
        mesh = sharding.make_mesh({"fsdp": tensor}, devices)
        same = sharding.param_sharding(network.shapes, mesh, rules, network.heads)
        assert {name: s.spec for name, s in same.items()} == plain


def test_first_rule_that_matches_the_whole_name_wins():
    mesh = sharding.make_mesh({"fsdp": -1})
    shapes = {"a.to_q.kernel": struct(2048, 2048), "b.to_q.kernel": struct(2048, 2048)}
    rules = [("to_q", "replicate"), (r"a\..*", "replicate"), (".*", "fsdp")]
    found = sharding.param_sharding(shapes, mesh, rules)
    assert found["a.to_q.kernel"].spec == PartitionSpec()
    assert found["b.to_q.kernel"].spec == PartitionSpec("fsdp")


def test_bad_rules():
    mesh = sharding.make_mesh({"fsdp": -1})
    shapes = {"conv_in.bias": struct(4)}
    for rules, said in [
        ([("conv_out.*", "fsdp")], "covers conv_in.bias"),
        ([("(", "fsdp")], r"'\(' is not a regular expression"),
        ([(".*", "tensor")], "'tensor' is not one of fsdp, replicate, column, row"),
        ([(".*",)], r"\('.\*',\) is not a pair of a regular expression and"),
        ([".*", "fsdp"], r"rule '.\*' is not a pair"),
        ([(1, "fsdp")], r"rule \(1, 'fsdp'\) is not a pair"),
    ]:
        with pytest.raises(InputError, match=said):
            sharding.param_sharding(shapes, mesh, rules)


@pytest.mark.parametrize(
    ("batch_size", "device_batch", "said"),
    [
        (10, 0, "use 8 or 16$"),
        (24, 2, "2 samples at a time .*use 16 or 32$"),
        (4, 1, "use 8$"),
        (0, 1, "at least 1"),
        (8, -1, "at least 0"),
    ],
)
def test_batch_that_does_not_divide(batch_size, device_batch, said):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(InputError, match=said):
        sharding.microbatches(batch_size, device_batch, mesh)


@pytest.mark.parametrize(
    ("batch_size", "device_batch", "count"),
    [(8, 0, 1), (8, 1, 1), (16, 0, 1), (16, 1, 2), (32, 2, 2), (8, 4, 1)],
)
def test_batch_that_divides(batch_size, device_batch, count):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    assert sharding.microbatches(batch_size, device_batch, mesh) == count


def test_batch_over_groups_of_devices():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharding.microbatches(8, 1, mesh)
    with pytest.raises(InputError, match=r"over 4 groups of 2 devices; use 4 or 8$"):
        sharding.microbatches(6, 0, mesh)
    put = sharding.put_batch(np.arange(8), sharding.batch_sharding(mesh))
    assert [len(shard.data) for shard in put.addressable_shards] == [2] * 8


def test_batch_is_split_over_both_axes():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    batch = {"noise": np.arange(16.0, dtype=np.float32).reshape(16, 1), "index": np.arange(16)}
    put = sharding.put_batch(batch, sharding.batch_sharding(mesh))
    assert {len(shard.data) for shard in put["noise"].addressable_shards} == {2}
    for name in batch:
        assert np.array_equal(put[name], batch[name])


def test_state_follows_its_parameters_and_steps_there():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def init(key):
        params = {"big.kernel": jax.random.normal(key, (1024, 2048)), "norm.scale": jnp.ones(64)}
        return train_state.init(params, optimizer)

    shapes = jax.eval_shape(init, jax.random.key(0))
    where = sharding.follow_params(shapes, shapes.params, mesh, RULES)
    split, whole = PartitionSpec(None, "fsdp"), PartitionSpec()
    adam = where.opt_state[1][0]
    for params in (where.params, where.ema_params, adam.mu, adam.nu):
        assert {n: s.spec for n, s in params.items()} == {"big.kernel": split, "norm.scale": whole}
    for counter in (where.step, where.skipped, where.skipped_in_a_row, adam.count):
        assert counter.spec == whole

    state = jax.jit(init, out_shardings=where)(jax.random.key(0))
    for array, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert array.sharding.is_equivalent_to(wanted, array.ndim)
    assert state.params["big.kernel"].addressable_shards[0].data.shape == (1024, 512)


def test_same_name_in_the_optimizer_but_another_shape_is_replicated():
    mesh = sharding.make_mesh({"fsdp": -1})
    params = {"big.kernel": struct(2048, 2048)}
    factored = ({"big.kernel": struct(2048)},)
    counter = struct(dtype=jnp.int32)
    shapes = train_state.TrainState(counter, params, params, factored, counter, counter, {})
    where = sharding.follow_params(shapes, shapes.params, mesh, RULES)
    assert where.opt_state[0]["big.kernel"].spec == PartitionSpec()


def test_with_sharding_keeps_shapes():
    mesh = sharding.make_mesh({"data": -1})
    shapes = sharding.with_sharding({"x": struct(3)}, {"x": sharding.replicated(mesh)})
    assert shapes["x"].shape == (3,)
    assert shapes["x"].sharding == sharding.replicated(mesh)


def test_initial_state_can_be_donated():
    optimizer = optax.adamw(1e-3)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    init = lambda params: train_state.init(params, optimizer)  # noqa: E731
    params = {"x": jnp.ones((2, 2))}
    for state in (init(params), jax.jit(init)(params)):
        state = step(step(state))
        assert int(state.step) == 2
        assert np.array_equal(state.ema_params["x"], np.full((2, 2), 3.0))
    assert np.array_equal(params["x"], np.ones((2, 2)))  # the caller's are still there
