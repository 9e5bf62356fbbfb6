"""Before JAX starts: 8 fake CPU devices, strict shapes, annotations checked."""

import os
import shutil
import tempfile

import fast_xla

# Threads of PyTorch and BLAS would wait for each other: each core has a process of tests already.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{fast_xla.FLAGS} --xla_force_host_platform_device_count=8"

# Programs that commands compile, for the tests of this process; never the user's own cache.
CACHE = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="r0_jax_tests_")

import jax
from jaxtyping import install_import_hook
from vocabularies import bpe, vocab  # noqa: F401 (fixtures)

install_import_hook("r0_jax", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--parity-report", metavar="FILE", help="write what `make parity` measured")


def pytest_sessionfinish(session):
    shutil.rmtree(CACHE, ignore_errors=True)
    path = session.config.getoption("--parity-report")
    if not path or session.config.getoption("collectonly"):
        return
    import importlib.metadata
    from pathlib import Path

    import full_width
    import parity

    worst: dict[tuple[str, str], parity.Measurement] = {}
    for measured in parity.MEASURED:
        kind = measured.what.rstrip("0123456789 ") or "output"
        key = measured.test.removeprefix("tests/"), kind
        if key not in worst or measured.error > worst[key].error:
            worst[key] = measured
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "flax", "torch", "diffusers", "transformers")
    )
    rows = "".join(
        f"| `{test}` | {kind} | {m.error:.1e} | {m.tolerance:.0e} |\n"
        for (test, kind), m in worst.items()
    )
    Path(path).write_text(
        f"""# Parity with PyTorch

The same random weights and inputs in diffusers or transformers and here. The error is the largest
difference as a share of the largest element. All is float32, except where a test's name says
otherwise. Gradients are with respect to the inputs. Made by `make parity` on a CPU with {versions}.

| test | of | error | allowed |
|---|---|---:|---:|
{rows}
## At full width

Every network at its published width and depth, in float32. PyTorch's side and this one run in a
process each: the table has seconds and peak memory of either, weights drawn included. A reward is
also run with its tower in bfloat16 and its head in float32. The table then has the score's largest
difference from float32, and the cosine of the image gradients. Gradients are with respect to
images, latents and prompt embeddings. Text encoders are frozen and have none.
`python tests/support/full_width.py NAME` measures one. This machine had {os.cpu_count()} CPU cores.

{full_width.table()}""",
        encoding="utf-8",
    )
