"""Every backend against XLA, forward and backward.

Splash runs as its kernel interpreted on CPU. cuDNN needs an NVIDIA GPU, where
`python -m pytest tests/models/test_attention_backend.py` runs it in a process of its own, since
tests themselves compute on the CPU.
"""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from r0_jax.errors import InputError
from r0_jax.models import attention_backend
from r0_jax.models.attention import Attention, dot_product_attention
from r0_jax.models.attention_backend import Backend
from r0_jax.parallel import sharding
from r0_jax.weights.network import Network, init

ROOT = Path(__file__).parents[2]
SPLASH = Backend("splash", interpret=True)


def inputs(batch, t, s, channels):
    """Query, key, value, and what the output is multiplied by to get a gradient."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((batch, n, channels)), jnp.float32) for n in (t, s, s, t)
    ]


def output_and_gradients(backend, arrays, heads=2, **options):
    query, key, value, weights = arrays

    def attend(*qkv):
        with attention_backend.use(backend):
            return dot_product_attention(*qkv, heads, **options)

    @jax.jit
    def both(query, key, value):
        output, pullback = jax.vjp(attend, query, key, value)
        return output, *pullback(weights.astype(output.dtype))

    return both(query, key, value)


def assert_equal(found, expected, tolerance=1e-5):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@pytest.mark.parametrize(
    "t, s, channels, options",
    [
        (64, 64, 80, {}),  # self-attention of Stable Diffusion 1.x: 40 channels a head
        (64, 77, 32, {}),  # of pixels to a prompt
        (77, 77, 32, {"is_causal": True}),  # CLIP
        (256, 128, 256, {}),  # nothing to fill up
        (130, 600, 16, {"scale": 1.0}),  # more keys than a block
        (9, 21, 16, {"mask": [21, 13]}),  # padded prompts
        (9, 21, 16, {"mask": [1, 20], "scale": 0.3}),
        (10, 10, 16, {"bias": 1}),  # of T5: by XLA
    ],
    ids=str,
)
def test_splash_equals_xla(t, s, channels, options):
    arrays = inputs(2, t, s, channels)
    if "mask" in options:
        options = options | {"mask": jnp.arange(s)[None] < jnp.asarray(options["mask"])[:, None]}
    if "bias" in options:
        options = {
            "bias": jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, t, s)), jnp.float32)
        }
    assert_equal(
        output_and_gradients(SPLASH, arrays, **options),
        output_and_gradients(attention_backend.XLA, arrays, **options),
    )


def test_splash_keys_that_are_masked_do_not_matter():
    query, key, value, weights = inputs(1, 4, 6, 16)
    options = {"mask": jnp.asarray([[True] * 4 + [False] * 2])}
    other = output_and_gradients(SPLASH, [query, key.at[:, 4:].add(9.0), value, weights], **options)
    assert_equal(output_and_gradients(SPLASH, [query, key, value, weights], **options), other)
    assert np.abs(other[3][:, 4:]).max() == 0 < np.abs(other[3][:, :4]).max()


def test_splash_in_bfloat16():
    arrays = [x.astype(jnp.bfloat16) for x in inputs(1, 40, 40, 32)]
    assert_equal(
        output_and_gradients(SPLASH, arrays),
        output_and_gradients(attention_backend.XLA, arrays),
        2e-2,
    )


@pytest.mark.parametrize(
    "batch, shape",
    [(8, {"data": 2, "fsdp": 2}), (1, {"data": 2, "fsdp": 2}), (8, {"data": 2, "tensor": 2})],
)
def test_splash_is_split_over_the_batch(batch, shape):
    """8 samples over 4 devices; one alone is computed by each of them."""
    mesh = sharding.make_mesh(shape, jax.devices()[:4])
    arrays = inputs(batch, 5, 7, 16)
    mask = jnp.asarray(np.random.default_rng(1).random((batch, 7)) < 0.7).at[:, 0].set(True)
    expected = output_and_gradients(attention_backend.XLA, arrays, mask=mask)
    placed = jax.device_put(
        arrays, sharding.batch_sharding(mesh) if batch == 8 else sharding.replicated(mesh)
    )
    found = output_and_gradients(Backend("splash", mesh, interpret=True), placed, mask=mask)
    assert_equal(found, expected)
    assert all(x.sharding.is_fully_replicated == (batch == 1) for x in found)


def attention_network(backend):
    def build(rngs):
        module = Attention(16, 2, rngs=rngs)
        module.config = None
        return module

    return Network(**(vars(Network.abstract(build)) | {"attention": backend})), init(
        build, jax.random.key(0)
    )


def test_the_backend_of_a_network_is_that_of_its_layers_alone():
    x = inputs(1, 6, 6, 16)[0]
    (plain, params), (splash, _) = map(attention_network, (attention_backend.XLA, SPLASH))
    programs = [str(jax.make_jaxpr(network)(params, x)) for network in (plain, splash, plain)]
    assert ["pallas_call" in program for program in programs] == [False, True, False]
    assert_equal([jax.jit(splash)(params, x)], [jax.jit(plain)(params, x)])


def test_gradients_flow_through_rematerialized_layers():
    """As the sampler's steps are: the kernel is then traced twice."""
    x = inputs(1, 6, 6, 16)[0]
    gradients = []
    for backend in (attention_backend.XLA, SPLASH):
        network, params = attention_network(backend)
        call = jax.checkpoint(functools.partial(network, params))
        gradients.append(jax.jit(jax.grad(lambda x, call=call: jnp.sum(jnp.sin(call(call(x))))))(x))
    assert_equal(gradients[1:], gradients[:1])


def device(platform, version="", capability=None):
    return SimpleNamespace(
        platform=platform,
        compute_capability=capability,
        device_kind="Tesla",
        client=SimpleNamespace(platform_version=version),
    )


@pytest.mark.parametrize(
    "name, dtype, there, said",
    [
        (
            "flash",
            "float32",
            device("cpu"),
            "'flash' is unknown; use 'auto', 'xla', 'cudnn', 'splash'",
        ),
        ("cudnn", "bfloat16", device("cpu"), "needs an NVIDIA GPU, but JAX computes on cpu here"),
        ("cudnn", "bfloat16", device("gpu", "rocm 6"), "needs an NVIDIA GPU"),
        ("cudnn", "bfloat16", device("gpu", "cuda 12", "7.5"), "8.0 or newer, but Tesla has 7.5"),
        (
            "cudnn",
            "float32",
            device("gpu", "cuda 12", "9.0"),
            "dtype='bfloat16', but dtype='float32'",
        ),
        ("cudnn", "bfloat16", device("gpu", "cuda 12", "9.0"), ""),
        (
            "splash",
            "float32",
            device("gpu", "cuda 12", "9.0"),
            "needs a TPU, but JAX computes on gpu",
        ),
        ("splash", "float32", device("tpu"), ""),
        ("xla", "float32", device("cpu"), ""),
    ],
    ids=str,
)
def test_a_backend_that_this_machine_has_not_is_refused_at_the_start(
    monkeypatch, name, dtype, there, said
):
    monkeypatch.setattr(jax, "devices", lambda: [there])
    if not said:
        return attention_backend.check(name, dtype)
    with pytest.raises(InputError, match=said) as error:
        attention_backend.check(name, dtype)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "t, s, channels, dtype, capability, biased, can",
    [
        (64, 77, 40, jnp.bfloat16, "8.0", False, True),
        (64, 64, 160, jnp.bfloat16, "8.0", False, False),
        (64, 64, 160, jnp.bfloat16, "9.0", False, True),
        (64, 64, 512, jnp.bfloat16, "9.0", False, False),  # the VAE
        (64, 64, 12, jnp.bfloat16, "9.0", False, False),
        (64, 64, 64, jnp.float32, "9.0", False, False),
        (64, 77, 64, jnp.bfloat16, "9.0", True, False),
        (64, 78, 64, jnp.float16, "9.0", True, True),
    ],
    ids=str,
)
def test_what_cudnn_can_do(monkeypatch, t, s, channels, dtype, capability, biased, can):
    monkeypatch.setattr(jax, "devices", lambda: [device("gpu", "cuda", capability)])
    query, key = (jnp.zeros((1, n, 2, channels), dtype) for n in (t, s))
    assert attention_backend._cudnn_can(query, key, biased) == can


@pytest.mark.parametrize(
    "t, s, causal", [(6, 7, False), (5, 8, False), (7, 7, True), (4, 6, False)]
)
def test_odd_lengths_reach_cudnn_as_even_ones(monkeypatch, t, s, causal):
    """With XLA in the place of cuDNN: what is filled up is left out again."""
    plain, lengths = jax.nn.dot_product_attention, []

    def by_xla(query, key, value, **options):
        assert options.pop("implementation") == "cudnn"
        lengths.extend([query.shape[1], key.shape[1]])
        return plain(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax, "devices", lambda: [device("gpu", "cuda", "9.0")])
    arrays = [x.astype(jnp.bfloat16) for x in inputs(2, t, s, 16)]
    expected = output_and_gradients(attention_backend.XLA, arrays, is_causal=causal)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    found = output_and_gradients(Backend("cudnn"), arrays, is_causal=causal)
    assert lengths == [t + t % 2, s + s % 2]
    assert_equal(found, expected, 1e-2)


@pytest.mark.parametrize("backend", [attention_backend.XLA, SPLASH, Backend("cudnn")])
def test_queries_may_share_keys_which_end_at_lengths(monkeypatch, backend):
    """Against a key for each query and a mask; with XLA in the place of cuDNN."""
    plain, seen = jax.nn.dot_product_attention, []

    def by_xla(*arrays, **options):
        seen.append(options.pop("implementation"))
        return plain(*arrays, implementation="xla", **options)

    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, *shape)), jnp.bfloat16)
        for shape in ((9, 4, 16), (12, 2, 16), (12, 2, 16))
    )
    lengths = jnp.asarray([12, 5], jnp.int32)
    mask = jnp.arange(12)[None] < lengths[:, None]
    each = [jnp.repeat(x, 2, axis=2) for x in (key, value)]
    expected = plain(query, *each, mask=mask[:, None, None])
    monkeypatch.setattr(jax, "devices", lambda: [device("gpu", "cuda", "9.0")])
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    with attention_backend.use(backend):
        found = attention_backend.attend(query, key, value, lengths=lengths)
    assert_equal([found], [expected], 1e-2)
    assert seen == {"xla": ["xla"], "splash": [], "cudnn": ["cudnn"]}[backend.name]


CUDNN_CASES = {  # name -> (t, s, channels of each of 2 heads, options, by cuDNN on any GPU)
    "self": (4096, 4096, 40, {}, True),
    "joint": (1178, 1178, 64, {}, True),
    "prompt": (256, 77, 80, {}, True),
    "odd queries": (255, 64, 64, {}, True),
    "causal": (77, 77, 64, {"is_causal": True}, True),
    "mask": (24, 24, 64, {"mask": 1}, False),
    "bias": (64, 64, 64, {"bias": 1, "scale": 1.0}, True),
    "odd bias": (21, 21, 64, {"bias": 1}, False),
    "vae": (256, 256, 512, {}, False),
}


def cudnn_cases():
    """{case: (whether cuDNN's program is in it, largest errors of output and gradients)}; on the
    GPU, in bfloat16, as a share of the float32 result of XLA."""
    found = {}
    for name, (t, s, channels, options, _) in CUDNN_CASES.items():
        rng = np.random.default_rng(1)
        arrays = [x.astype(jnp.bfloat16) for x in inputs(2, t, s, 2 * channels)]
        options = dict(options)
        if "mask" in options:
            options["mask"] = jnp.arange(s)[None] < jnp.asarray([s, s // 2])[:, None]
        if "bias" in options:
            options["bias"] = jnp.asarray(rng.standard_normal((1, 2, t, s)), jnp.bfloat16)
        exact = {k: v.astype(jnp.float32) if k == "bias" else v for k, v in options.items()}
        with jax.default_matmul_precision("highest"):
            expected = output_and_gradients(
                attention_backend.XLA, [x.astype(jnp.float32) for x in arrays], **exact
            )
        result = output_and_gradients(Backend("cudnn"), arrays, **options)
        errors = [
            float(np.abs(np.asarray(x, np.float32) - y).max() / np.abs(y).max())
            for x, y in zip(result, map(np.asarray, expected), strict=True)
        ]
        with attention_backend.use(Backend("cudnn")):
            program = (
                jax.jit(lambda *qkv, o=options: dot_product_attention(*qkv, 2, **o))
                .lower(*arrays[:3])
                .as_text()
            )
        found[name] = "cudnn$fmha" in program, errors
    return found


def test_cudnn_equals_xla_on_a_gpu():
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        pytest.skip("jax has no CUDA here: python -m pip install 'jax[cuda13]'")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    code = (
        "import json, jax, test_attention_backend as test\n"
        "gpu = jax.default_backend() == 'gpu'\n"
        "print('RESULT ' + json.dumps(test.cudnn_cases() if gpu else None))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    if found is None:
        pytest.skip("there is no NVIDIA GPU")
    print(json.dumps(found, indent=1))
    for name, (by_cudnn, errors) in found.items():
        assert by_cudnn == CUDNN_CASES[name][-1], name
        assert max(errors) < 2e-2 and all(map(math.isfinite, errors)), (name, errors)


class _Device(NamedTuple):
    platform: str
    device_kind: str = "some chip"


@pytest.mark.parametrize(
    ("there", "dtype", "expected"),
    [
        (device("tpu"), "float32", "splash"),
        (device("cpu"), "bfloat16", "xla"),
        (device("gpu", "cuda 12", "9.0"), "bfloat16", "cudnn"),
        (device("gpu", "cuda 12", "9.0"), "float32", "xla"),
        (device("gpu", "cuda 12", "7.5"), "bfloat16", "xla"),
    ],
)
def test_auto_is_what_suits_the_device(there, dtype, expected):
    assert attention_backend._resolved("auto", dtype, there) == expected
    assert attention_backend._resolved("xla", dtype, there) == "xla"


@pytest.mark.parametrize(("name", "expected"), [("auto", "xla"), ("splash", "splash")])
def test_a_config_and_a_mesh_make_a_backend(name, expected):
    mesh = sharding.make_mesh({"data": -1})
    config = ConfigDict({"attention": name, "dtype": "bfloat16"})
    assert attention_backend.of_config(config, mesh) == Backend(expected, mesh)


def test_a_backend_is_checked_for_the_device_that_is_planned_for():
    attention_backend.check("splash", "bfloat16", _Device("tpu"))
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        attention_backend.check("cudnn", "bfloat16", _Device("tpu"))
    with pytest.raises(InputError, match="use 'auto', 'xla'"):
        attention_backend.check("flash", "float32")
