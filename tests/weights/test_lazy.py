"""Weights go from their file to their devices one at a time, and are what the file holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from r0_jax.errors import InputError
from r0_jax.parallel import sharding
from r0_jax.pipelines import families
from r0_jax.stand_ins import miniature, miniature_files
from r0_jax.weights import convert, lazy
from r0_jax.weights.network import Network

ROOT = Path(__file__).parents[2]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Layers(nnx.Module):
    """Kernels, vectors, tables and a number, of which some are sharded and read in many pieces."""

    def __init__(self, rngs: nnx.Rngs):
        self.config = None
        self.wide = nnx.Linear(1024, 1504, rngs=rngs)
        self.tall = nnx.Linear(1504, 1024, rngs=rngs)
        self.conv = nnx.Conv(384, 320, (3, 3), rngs=rngs)
        self.one = nnx.Linear(7, 1, rngs=rngs)
        self.odd = nnx.Linear(1021, 1031, rngs=rngs)  # no axis that 8 devices divide
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.table = nnx.Embed(2053, 640, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 2048, 640)))
        self.logit_scale = nnx.Param(jnp.asarray(2.5))


@pytest.fixture(scope="module")
def network():
    return Network.abstract(Layers)


@pytest.fixture(scope="module", params=DTYPES)
def stored(request, network, tmp_path_factory):
    """(file of the safetensors library, its tensors in JAX layout and in the dtype of the file)."""
    rng = np.random.default_rng(0)
    tensors, params = {}, {}
    for name, struct in network.shapes.items():
        value = rng.standard_normal(convert.file_shape(name, struct.shape), np.float32)
        value = np.asarray(value * 10.0 ** rng.integers(-3, 3)).astype(DTYPES[request.param])
        tensors[convert.to_key(name)] = value
        params[name] = np.asarray(convert.from_checkpoint(name, value), order="C")
    path = tmp_path_factory.mktemp("stored") / "model.safetensors"
    save_file(tensors, path)
    return path, params


def same(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return (found.dtype, found.shape, found.tobytes()) == (
        expected.dtype,
        expected.shape,
        expected.tobytes(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "strategy, mesh",
    [("fsdp", {"fsdp": -1}), ("fsdp", {"data": 4, "fsdp": 2}), ("replicate", {"data": -1})],
)
def test_every_device_gets_its_part(stored, network, dtype, strategy, mesh):
    path, expected = stored
    leaves = convert.open_params([path], network, dtype)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()}
    where = sharding.param_sharding(shapes, sharding.make_mesh(mesh), [(".*", strategy)])
    placed = lazy.place(leaves, where)
    split = 0
    for name, value in placed.items():
        whole = expected[name].astype(DTYPES[dtype])
        assert value.sharding == where[name] and value.dtype == DTYPES[dtype]
        assert same(value, whole), name
        split += not value.sharding.is_fully_replicated
        for shard in value.addressable_shards:
            assert same(shard.data, whole[shard.index]), name
    if strategy == "fsdp" and dtype == "float32":
        assert split >= 4


def test_any_part_of_a_tensor_is_read_alone(stored, network):
    path, expected = stored
    leaves = convert.open_params([path], network, "float32")
    for name, index in [
        ("wide.kernel", np.s_[3:900, 1:1400]),
        ("positions", np.s_[0:1, 9:700, :]),
        ("conv.kernel", np.s_[1:2, :, 5:300, 2:319]),
        ("one.kernel", np.s_[2:5, :]),
        ("table.embedding", np.s_[600:601, 30:]),
        ("norm.scale", np.s_[:0]),
        ("logit_scale", ()),
    ]:
        index = index if isinstance(index, tuple) else (index,)
        assert same(leaves[name][index], expected[name].astype(np.float32)[index]), name
    assert same(
        leaves["wide.bias"].astype(jnp.bfloat16), expected["wide.bias"].astype(ml_dtypes.bfloat16)
    )
    assert jnp.asarray(leaves["odd.kernel"]).shape == (1021, 1031)


def test_shards_of_a_file_and_the_whole_are_the_same(stored, network, tmp_path, monkeypatch):
    path, expected = stored
    dtype = next(iter(expected.values())).dtype.name
    monkeypatch.setattr(convert, "MAX_SHARD_SIZE", 3_000_000)
    convert.save_shards(convert.open_params([path], network, dtype), tmp_path, "model", dtype)
    files = convert.find_files(tmp_path, "model")
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(
        sum(x.nbytes for x in tensors.values()) <= 3_000_000 or len(tensors) == 1
        for tensors in map(load_file, files)
    )
    found = convert.load(files, network, dtype)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


def test_leaves_stay_true_to_the_file_that_was_opened(network, tmp_path):
    params = miniature_files.random_params(network, seed=1)
    path = tmp_path / "model.safetensors"
    convert.save(params, path)
    leaves = convert.open_params([path], network)
    convert.save({name: 2 * value for name, value in params.items()}, path)
    assert all(same(leaves[name], value) for name, value in params.items())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "stored_as, dtype",
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    network, tmp_path, monkeypatch, value, stored_as, dtype
):
    params = miniature_files.random_params(network, seed=1)
    params["tall.kernel"][1503, 1023] = value
    path = tmp_path / "model.safetensors"
    with np.errstate(all="ignore"), monkeypatch.context() as unchecked:
        unchecked.setattr(convert, "_whole", lambda key, value: value)
        convert.save(params, path, stored_as)
    leaves = convert.open_params([path], network, dtype)
    with pytest.raises(InputError) as error:
        lazy.place(leaves)
    assert str(error.value).startswith(f"{path}: tall.weight holds NaN or infinities")
    assert len(str(error.value).splitlines()) == 1
    lazy.place({name: leaf for name, leaf in leaves.items() if name != "tall.kernel"})


def test_a_file_cut_short_after_it_was_opened(network, tmp_path):
    path = tmp_path / "model.safetensors"
    convert.save(miniature_files.random_params(network, seed=1), path)
    leaves = convert.open_params([path], network)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"not a complete safetensors file \(it ends too early"):
        lazy.place(leaves)


def test_arrays_are_placed_too(network):
    mesh = sharding.make_mesh({"data": -1})
    tree = {
        "a": np.ones(3),
        "b": jnp.ones(2),
        "c": lazy.computed((2,), "float32", lambda: np.arange(2.0)),
    }
    placed = lazy.place(tree, sharding.replicated(mesh), "bfloat16")
    assert all(x.dtype == jnp.bfloat16 and len(x.devices()) == 8 for x in placed.values())
    assert lazy.place(placed)["a"] is placed["a"]
    assert lazy.place({}) == {}
    with pytest.raises(TypeError, match="Lazy"):
        jax.jit(jnp.sum)(tree["c"])


def test_opening_a_pipeline_reads_no_weights(tmp_path, monkeypatch):
    miniature.write(tmp_path, "StableDiffusionXLPipeline")
    monkeypatch.setattr(convert.TensorFile, "read_into", None)
    pipeline = families.load(tmp_path)
    assert all(isinstance(x, lazy.Lazy) for part in pipeline.params.values() for x in part.values())


MEMORY = """
import json, sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from r0_jax.parallel import sharding
from r0_jax.weights import convert, lazy
from r0_jax.weights.network import Network
from r0_jax.weights.tensor_file import Tensor, write

class Layers(nnx.Module):
    def __init__(self, rngs):
        self.config = None
        self.layers = nnx.List([nnx.Linear(4096, 4096, use_bias=False, rngs=rngs)
                                for _ in range(12)])

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

path, mesh = Path(sys.argv[1]), sharding.make_mesh({"fsdp": -1})
network = Network.abstract(lambda rngs: Layers(rngs))
value = np.tile(np.arange(4096, dtype=np.float16), (4096, 1))
write(path, [Tensor(convert.to_key(name), x.shape, value.dtype, lambda: value)
             for name, x in network.shapes.items()])
del value
leaves = convert.open_params([path], network, "bfloat16")
where = {name: sharding.NamedSharding(mesh, sharding.PartitionSpec("fsdp")) for name in leaves}
jax.device_put(np.ones(8), sharding.replicated(mesh)).block_until_ready()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = kilobytes("VmRSS")
placed = lazy.place(leaves, where)
print(json.dumps({"peak": kilobytes("VmHWM") - before, "tensor": 2 * 4096**2 / 1024,
                  "shards": sum(shard.data.nbytes for x in placed.values()
                                for shard in x.addressable_shards) / 1024}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_a_host_holds_its_shards_and_one_tensor(tmp_path):
    """400 MB on 8 devices; a copy of all of it, or of two tensors at once, would show."""
    path = tmp_path / "model.safetensors"
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert path.stat().st_size > 400e6 and found["shards"] == 12 * found["tensor"]
    assert found["peak"] - found["shards"] < 1.3 * found["tensor"], found
