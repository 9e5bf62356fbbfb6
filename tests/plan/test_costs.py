"""FLOPs from the jaxpr, bytes from the HLO: against what can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from r0_jax.models import attention_backend
from r0_jax.parallel import sharding
from r0_jax.plan import hlo_cost, jaxpr_cost


def flops(f, *shapes: tuple[int, ...], trips: float = 1.0) -> float:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jaxpr_cost.flops(jax.make_jaxpr(f)(*args).jaxpr, trips)


def square(x):
    return x @ x


def test_matrix_products_and_convolutions():
    assert flops(jnp.matmul, (5, 6), (6, 7)) == 2 * 5 * 6 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 5, 6), (3, 6, 7)) == 3 * 420

    def conv(x, kernel, groups=1):
        return lax.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            "SAME",
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    assert flops(conv, (2, 8, 8, 4), (3, 3, 4, 6)) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert flops(lambda x, k: conv(x, k, 2), (2, 8, 8, 4), (3, 3, 2, 6)) == (
        2 * (2 * 4 * 4 * 6) * (3 * 3 * 2)
    )

    def patches(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    once = 2 * (2 * 2 * 2 * 6) * (4 * 4 * 3)  # and as much for each gradient
    assert (
        flops(
            jax.grad(lambda x, k: jnp.sum(patches(x, k) ** 2), (0, 1)), (2, 8, 8, 3), (4, 4, 3, 6)
        )
        == 3 * once
    )


def test_loops_count_as_often_as_they_go_round():
    once = 2 * 8**3
    assert flops(lambda x: lax.scan(lambda c, _: (square(c), None), x, length=5)[0], (8, 8)) == (
        5 * once
    )
    assert (
        flops(
            lambda x: lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, c: square(c), x),
            (8, 8),
            trips=1.5,
        )
        == 1.5 * once
    )
    assert flops(lambda x: lax.cond(x[0, 0] > 0, square, lambda x: x, x), (8, 8)) == once


def test_what_is_computed_again_counts_again():
    def loss(f):
        return jax.grad(lambda x: jnp.sum(f(x)))

    def twice(x):
        return jnp.tanh(square(jnp.tanh(square(x))))

    assert flops(loss(jax.checkpoint(twice)), (8, 8)) > flops(loss(twice), (8, 8))


def test_kernels_and_what_runs_on_each_device():
    backend = attention_backend.Backend("splash", sharding.make_mesh({"data": 8}), interpret=True)

    def attend(q):
        with attention_backend.use(backend):
            return attention_backend.attend(q, q, q, scale=1.0)

    # Two products of [128, 128] with 128 channels (of 8, filled up), for each of 8 samples.
    once = 8 * 2 * (2 * 128**3)
    assert flops(attend, (8, 128, 1, 8)) == once
    # Where devices do the same, kernels still say what each does.
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 128, 1, 8), (5, 5))]
    both = jax.make_jaxpr(lambda q, x: (attend(q), square(x)))(*args).jaxpr
    assert jaxpr_cost.flops(both, repeated=4) == once + 4 * 2 * 5**3


def cost(f, *args, trips: float = 1.0, **options) -> hlo_cost.Cost:
    return hlo_cost.cost(jax.jit(f, **options).lower(*args).compile().as_text(), trips)


def test_bytes_of_a_loop_count_as_often_as_it_goes_round():
    x = jnp.ones((256, 256))

    def once(c):
        return jnp.sort(c + 1, axis=0)

    few = cost(lambda x: lax.fori_loop(0, 10, lambda _, c: once(c), x), x).hbm_bytes
    many = cost(lambda x: lax.fori_loop(0, 100, lambda _, c: once(c), x), x).hbm_bytes
    assert 8 < many / few < 10.1
    by_length = cost(lambda x, n: lax.fori_loop(0, n, lambda _, c: once(c), x), x, 3, trips=100.0)
    assert by_length.hbm_bytes == pytest.approx(many, rel=0.05)


def test_of_a_stack_only_the_slice_is_read():
    stack = jnp.ones((50, 128, 128))
    looped = cost(
        lambda x, s: lax.scan(lambda c, w: (jnp.sort(c + w, axis=0), None), x, s)[0],
        jnp.ones((128, 128)),
        stack,
    ).hbm_bytes
    assert looped < 50 * 10 * 128 * 128 * 4  # and not 50 times all of it


def test_what_a_chip_sends():
    mesh = sharding.make_mesh({"data": 8})
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = jax.device_put(np.ones((8, 1000), np.float32), split)
    gathered = cost(lambda x: x * 2, x, out_shardings=whole).collective_bytes
    assert gathered == {"all-gather": 7 * 4000}
    summed = cost(lambda x: jnp.sum(x, axis=0), x, out_shardings=whole).collective_bytes
    assert summed == {"all-reduce": pytest.approx(2 * 7 / 8 * 4000)}


TPU_LOOP = """
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(10)
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %gte = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.1), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %g = f32[64,4]{1,0:T(8,128)S(1)} all-gather(%x), GROUPS, dimensions={0}
  %y = f32[8,4]{1,0:T(8,128)} slice(%g), slice={[0:8], [0:4]}
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%i, %y)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%zero, %x)
  %while.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body
  ROOT %out = f32[8,4]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
""".replace(
    "GROUPS",
    "channel_id=1, replica_groups=mesh['a'=1,'b'=8,'c'=32], device_ids=([32,8]T(1,0)) {'b'}",
)


TPU_SLICES = """
ENTRY %main (x: f32[256,1024]) -> f32[256,1024] {
  %x = f32[256,1024]{1,0:T(8,128)S(1)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[256,1024]{1,0:T(8,128)}, u32[], token[]) send(%x, %after-all), TARGET
  %send-done = token[] send-done(%send), is_host_transfer=true
  %recv = (f32[256,1024]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), TARGET
  %recv-done = (f32[256,1024]{1,0:T(8,128)}, token[]) recv-done(%recv)
  ROOT %y = f32[256,1024]{1,0:T(8,128)} get-tuple-element(%recv-done), index=0
}
""".replace(
    "TARGET",
    'frontend_attributes={_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="KIND"}',
)


@pytest.mark.parametrize(
    ("kind", "times"),
    [("ALL_REDUCE", 1.5), ("ALL_GATHER", 3), ("REDUCE_SCATTER", 0.75), ("ONE_TO_ONE", 1)],
)
def test_what_a_chip_sends_to_other_slices(kind, times):
    found = hlo_cost.cost(TPU_SLICES.replace("KIND", kind))
    assert found.dcn_bytes == times * 256 * 1024 * 4 and found.collective_bytes == {}


PREFETCHED = """
ENTRY %main (x: bf16[64,8], y: bf16[64,8]) -> bf16[8,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = bf16[64,8]{1,0} parameter(1)
  %copy-start = (bf16[64,8]{1,0:S(1)}, bf16[64,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %slice-start = ((bf16[64,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%y)
  %copy-done = bf16[64,8]{1,0:S(1)} copy-done(%copy-start)
  %slice-done = bf16[16,8]{1,0:S(1)} slice-done(%slice-start)
  %g = (bf16[64,8]{1,0}, bf16[128,8]{1,0}) all-gather-start(%x), replica_groups={{0,1}}
  ROOT %z = bf16[8,8]{1,0:S(1)} fusion(%copy-done, %slice-done), kind=kCustom, calls=%nothing
}

%nothing (p: bf16[64,8], q: bf16[16,8]) -> bf16[8,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %q = bf16[16,8]{1,0} parameter(1)
  ROOT %c = bf16[8,8]{1,0} convolution(%p, %q), dim_labels=bf_io->bf
}
"""


def test_what_is_fetched_ahead_is_read_once():
    found = hlo_cost.cost(PREFETCHED)
    # Into VMEM: all of x and a quarter of y. The gathered array is read and written in HBM.
    assert found.hbm_bytes == 2 * 8 * (64 + 16 + 64 + 128)
    assert found.collective_bytes == {"all-gather": 2 * 64 * 8}


SCATTERED = """
%scatter (p: bf16[64,8]) -> bf16[8,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %all-reduce.3 = bf16[64,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  %mine = bf16[8,8]{1,0} dynamic-slice(%all-reduce.3, %zero, %zero)
  ROOT %b = bf16[8,8]{1,0} bitcast(%mine)
}

ENTRY %main (x: bf16[64,8]) -> bf16[8,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  ROOT %y = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
"""


def test_a_sum_of_which_each_keeps_a_part_is_a_reduce_scatter():
    found = hlo_cost.cost(SCATTERED).collective_bytes
    assert found == {"reduce-scatter": 7 / 8 * 2 * 64 * 8}
    kept = SCATTERED.replace("ROOT %b", "%b").replace("%zero = ", "ROOT %zero = ")
    assert hlo_cost.cost(kept).collective_bytes == {"all-reduce": 2 * 7 / 8 * 2 * 64 * 8}


NESTED = """
%slice (p: bf16[20,8,4], i: s32[]) -> bf16[8,4] {
  %p = bf16[20,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %d = bf16[1,8,4]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,4}
  ROOT %b = bf16[8,4]{1,0:T(8,128)(2,1)} bitcast(%d)
}

%update (q: f32[20,8,4], v: f32[1,8,4], j: s32[]) -> f32[20,8,4] {
  %q = f32[20,8,4]{2,1,0:T(8,128)} parameter(0)
  %v = f32[1,8,4]{2,1,0:T(8,128)} parameter(1)
  %j = s32[]{:T(128)} parameter(2)
  ROOT %u = f32[20,8,4]{2,1,0:T(8,128)} dynamic-update-slice(%q, %v, %j)
}

%product (w: bf16[20,8,4], x: bf16[16,8], k: s32[]) -> (bf16[16,4], f32[160,4]) {
  %w = bf16[20,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %k = s32[]{:T(128)} parameter(2)
  %s = f32[20,8,4]{2,1,0:T(8,128)} parameter(3)
  %y = f32[1,8,4]{2,1,0:T(8,128)} parameter(4)
  %f = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%w, %k), kind=kLoop, calls=%slice
  %c = bf16[16,4]{1,0:T(8,128)(2,1)} convolution(%x, %f), dim_labels=bf_io->bf
  %g = f32[20,8,4]{2,1,0:T(8,128)} fusion(%s, %y, %k), kind=kLoop, calls=%update
  %h = f32[160,4]{1,0:T(8,128)} bitcast(%g)
  ROOT %r = (bf16[16,4]{1,0:T(8,128)(2,1)}, f32[160,4]{1,0:T(8,128)}) tuple(%c, %h)
}

ENTRY %main (w: bf16[20,8,4], x: bf16[16,8], k: s32[]) -> (bf16[16,4], f32[160,4]) {
  %w = bf16[20,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %k = s32[]{:T(128)S(6)} parameter(2)
  %y = f32[1,8,4]{2,1,0:T(8,128)} parameter(3)
  %s = f32[20,8,4]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %z = (bf16[16,4]{1,0}, f32[160,4]{1,0}) fusion(%w, %x, %k, %s, %y), calls=%product
}
"""


def test_of_what_fusions_within_fusions_slice_the_slice_counts():
    """One of 20 matrices is read and one written; x lies in VMEM, nothing is in the new buffer."""
    assert hlo_cost.cost(NESTED).hbm_bytes == 8 * 4 * 2 + 16 * 4 * 2 + 2 * 8 * 4 * 4


def test_a_tpus_program_says_less():
    """Its loops do not say how often they go round, arrays in VMEM move nothing through HBM."""
    found = hlo_cost.cost(TPU_LOOP)
    assert found.collective_bytes == {"all-gather": 10 * 7 * 8 * 4 * 4}
    assert found.hbm_bytes == 10 * 8 * 4 * 4  # the slice's result
