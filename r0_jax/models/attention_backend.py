"""What computes attention: XLA, cuDNN's flash attention (GPU) or splash attention (TPU).

`xla` writes all [T, S] weights to memory. The other two never do, and only they make large images
fit. The choice belongs to a `Network`; its layers find it while they are traced (`use`), and all of
them call `attend`. XLA computes a layer that a backend cannot compute: under cuDNN a VAE's single
head of 512 channels or a text encoder's mask, under splash T5's bias.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from r0_jax.errors import InputError
from r0_jax.models.choice import Choice

NAMES = ("xla", "cudnn", "splash")
AUTO = "auto"  # stands for the best one that a device has

_LANES = 128  # of a TPU's vector register; splash's tiles are multiples of it
_MOST_BLOCK = 512  # tokens that splash holds at once; more do not fit beside 512 channels


@dataclasses.dataclass(frozen=True)
class Backend:
    """Name what computes attention, and where.

    Attributes:
      name: one of `NAMES`.
      mesh: of splash, whose kernel is for one device: the mesh that splits samples and heads.
      batch_axes: the axes of this mesh that split the samples; its axis "tensor" splits the heads.
      interpret: run splash's kernel on any platform, slowly; for tests.
    """

    name: str = "xla"
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    interpret: bool = False


XLA = Backend()
_chosen = Choice("attention backend", XLA)
use = _chosen.use  # sets the backend of every `attend` that is traced meanwhile


def of_config(config: ConfigDict, mesh: Mesh) -> Backend:
    """Return the backend of a config's `attention` and `dtype` for networks on this mesh."""
    return Backend(_resolved(config.attention, config.dtype, mesh.devices.flat[0]), mesh)


def _resolved(name: str, dtype: str, device: Any) -> str:
    """Return the name of a backend, in place of "auto" the best one that the device has."""
    if name != AUTO:
        return name
    if device.platform == "tpu":
        return "splash"
    try:
        check("cudnn", dtype, device)
    except InputError:
        return "xla"
    return "cudnn"


def check(name: str, dtype: str, device: Any = None) -> None:
    """Raise InputError unless a device has this backend for networks in `dtype`.

    The device is by default the first one of this machine.
    """
    if name not in (*NAMES, AUTO):
        raise InputError(
            f"attention={name!r} is unknown; use {', '.join(map(repr, (AUTO, *NAMES)))}"
        )
    device = jax.devices()[0] if device is None else device
    if name == "cudnn":
        client = getattr(device, "client", None)  # None for a topology that is not there
        if "cuda" not in getattr(client, "platform_version", ""):
            raise InputError(
                "attention='cudnn' needs an NVIDIA GPU, but JAX computes on "
                f"{device.platform} here: use 'xla'"
            )
        if float(device.compute_capability) < 8:
            raise InputError(
                "attention='cudnn' needs a GPU of compute capability 8.0 or newer, "
                f"but {device.device_kind} has {device.compute_capability}: use 'xla'"
            )
        if dtype != "bfloat16":
            raise InputError(
                f"attention='cudnn' needs dtype='bfloat16', but dtype={dtype!r}: set "
                "one or the other"
            )
    if name == "splash" and device.platform != "tpu":
        raise InputError(
            f"attention='splash' needs a TPU, but JAX computes on {device.platform} here: use 'xla'"
        )


def attend(
    query: Float[Array, "b t n c"],
    key: Float[Array, "b s k c"],
    value: Float[Array, "b s k c"],
    *,
    bias: Float[Array, "#b n t s"] | None = None,
    mask: Bool[Array, "b s"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Float[Array, "b t n c"]:
    """Return softmax(q k^T / sqrt(c) + bias) v of n heads, by the backend in `use`.

    The softmax is float32.

    Args:
      key, value: of fewer heads where queries share them (grouped-query attention): query head h
        reads head h // (n / k).
      mask: False at keys that nothing attends to.
      lengths: of the keys: nothing attends to those after them. cuDNN computes it, unlike a mask.
      scale: replaces 1 / sqrt(c).
    """
    backend = _chosen.get()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if backend.name == "splash" and bias is None:
        if lengths is not None:
            before = jnp.arange(key.shape[1])[None] < lengths[:, None]
            mask = before if mask is None else mask & before
        if (shared := query.shape[2] // key.shape[2]) > 1:
            key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
        return _splash(query, key, value, mask, scale, is_causal, backend)
    cudnn = backend.name == "cudnn" and mask is None and _cudnn_can(query, key, bias is not None)
    if cudnn and bias is None:
        return _cudnn_of_any_length(query, key, value, lengths, scale=scale, is_causal=is_causal)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        None if mask is None else mask[:, None, None, :],
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if cudnn else "xla",
    )


def _cudnn_can(query: jax.Array, key: jax.Array, biased: bool) -> bool:
    """Return whether `jax.nn.dot_product_attention` accepts this for cuDNN."""
    most = 256 if float(jax.devices()[0].compute_capability) >= 9 else 128
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= most
        and (even or not biased)
    )


def _cudnn_of_any_length(query, key, value, lengths=None, **options):
    """Return attention by cuDNN, also of odd lengths (a prompt's 77 tokens).

    JAX raises an error for the gradient of odd lengths, as if there were a bias. So one token
    fills them up, which cuDNN masks, as it does the keys after `lengths`.
    """
    t, s = query.shape[1], key.shape[1]
    if t % 2 or s % 2 or lengths is not None:

        def length(x):
            return jnp.full(len(x), x.shape[1], jnp.int32)

        def filled(x):
            return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

        options |= {
            "query_seq_lengths": length(query),
            "key_value_seq_lengths": length(key) if lengths is None else lengths,
        }
        query, key, value = filled(query), filled(key), filled(value)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **options)[:, :t]


def _splash(query, key, value, mask, scale, is_causal, backend: Backend):
    mesh, masks = backend.mesh, () if mask is None else (mask,)

    def of_one_device(query, key, value, *masks):
        return _splash_blocks(
            query, key, value, *masks, scale=scale, is_causal=is_causal, interpret=backend.interpret
        )

    if mesh is None or mesh.size == 1:
        return of_one_device(query, key, value, *masks)
    # Every device computes what does not divide, such as the one empty prompt.
    parts = math.prod(mesh.shape[axis] for axis in backend.batch_axes)
    batch = backend.batch_axes if len(query) % parts == 0 else None
    heads = "tensor" if query.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(batch, None, heads)  # [B, T, n, C]
    return jax.shard_map(
        of_one_device,
        mesh=mesh,
        in_specs=(spec,) * 3 + (PartitionSpec(batch),) * len(masks),
        out_specs=spec,
        check_vma=False,
    )(query, key, value, *masks)


def _splash_blocks(query, key, value, mask=None, *, scale, is_causal, interpret):
    """Return splash attention of one device, with tokens and channels filled up to whole tiles."""
    # Slow to import, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (b, t, heads, channels), s = query.shape, key.shape[1]
    block_q, block_kv = _block(t), _block(s)

    def filled(x, block):  # [B, T, n, C] -> [B, n, T', C']
        rest = ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, -channels % _LANES))
        return jnp.pad(x, rest).swapaxes(1, 2)

    query = (scale * query.astype(jnp.float32)).astype(query.dtype)
    query, key, value = filled(query, block_q), filled(key, block_kv), filled(value, block_kv)
    # Tokens attend within their segment: 0 for all queries and the keys to see, 1 for the others.
    unseen = jnp.zeros((b, s), bool) if mask is None else ~mask
    unseen = jnp.pad(unseen, ((0, 0), (0, -s % block_kv)), constant_values=True)
    segments = splash.SegmentIds(
        q=jnp.zeros((b, query.shape[2]), jnp.int32), kv=unseen.astype(jnp.int32)
    )
    kind = masks.CausalMask if is_causal else masks.FullMask
    shape = (query.shape[2], key.shape[2])
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([kind(shape) for _ in range(heads)]),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out = jax.vmap(kernel)(query, key, value, segments)
    return out.swapaxes(1, 2)[:, :t, :, :channels]


def _block(tokens: int) -> int:
    return min(tokens + -tokens % _LANES, _MOST_BLOCK)
