"""The wheel: what is in it, and all of it at work in an empty folder of a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import fast_xla
import forks
import pytest

import r0_jax

ROOT = Path(__file__).parent.parent
COMMANDS = [
    "r0_jax.main",
    "r0_jax.encode_prompts",
    "r0_jax.sample",
    "r0_jax.score",
    "r0_jax.evaluate",
    "r0_jax.ablate",
    "r0_jax.report",
    "r0_jax.demo",
    "r0_jax.convert_reward",
    "r0_jax.convert_single_file",
    "r0_jax.export",
    "r0_jax.plan",
    "r0_jax.pretrain",
]
RECIPES = [
    "sd15_r0",
    "sdxl_r0",
    "sd3_r0",
    "sd35_r0",
    "z_image_r0",
    "taiyi_r0",
    "rg_lcm",
    "di_plus_plus",
    "refl",
    "draft",
    "shapes_r0",
    "shapes_base",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, which a build would leave files in."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("r0_jax", "configs", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for pattern in ("*.toml", "setup.py", "requirements*.txt", "README.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={source}/dist", source)
    [path] = (source / "dist").iterdir()
    return path


def pip(*arguments, python=sys.executable):
    flags = ["--python", python, "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", *flags, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def environment(folder):
    """A fresh virtual environment that sees the packages of this one; returns its Python.

    What its own site-packages hold comes first, and no .pth file of this one's is read: neither
    the checkout nor an editable install is seen.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(others)), encoding="utf-8")
    return folder / "bin" / "python"


def variables(folder):
    """The environment of a process that knows of no checkout."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": fast_xla.FLAGS,
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def test_the_wheel_holds_the_package_its_recipes_and_its_data(wheel):
    assert wheel.name == f"r0_jax-{r0_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = f"r0_jax-{r0_jax.__version__}.dist-info"
        metadata = file.read(f"{info}/METADATA").decode()
    package = {name for name in names if not name.startswith(f"{info}/")}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "r0_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
    # `configs.common` is for recipes in a checkout.
    recipes = {f"r0_jax/recipes/{x.as_posix()}" for x in files if x.parts[0] != "common"}
    assert package == wanted | recipes
    # What the line above would not miss if the checkout lacked it.
    assert {f"r0_jax/recipes/{name}.py" for name in RECIPES} < recipes
    assert {
        "r0_jax/py.typed",
        "r0_jax/shapes/prompts/train.txt",
        "r0_jax/shapes/checkpoints/pipeline/unet/diffusion_pytorch_model.safetensors",
        "r0_jax/stand_ins/published/stable_diffusion_xl/unet/config.json",
    } < package
    assert f"{info}/licenses/LICENSE" in names

    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?:\[.*?\])?[^;\n]*(?:; (.*))?$", metadata, re.M)
    extras = {extra for _, marker in needed for extra in re.findall(r'extra == "(\w+)"', marker)}
    assert extras == {"tpu", "cuda", "convert", "demo", "dev"}
    assert {"jax", "flax", "optax", "grain"} <= {name for name, marker in needed if not marker}
    assert not any(name == "torch" for name, marker in needed if not marker)
    assert 'Requires-Dist: torch==2.13.0; extra == "dev"' in metadata
    for name in ("torch", "diffusers", "accelerate"):
        assert (name, 'extra == "convert"') in needed


def test_every_command_of_the_wheel_starts_in_an_empty_folder(wheel, tmp_path):
    python, empty = environment(tmp_path / "env"), tmp_path / "empty"
    pip("install", "--no-deps", "--no-index", "--no-compile", wheel, python=python)
    empty.mkdir()
    options = {"cwd": empty, "env": variables(tmp_path)}
    where = subprocess.check_output(
        [python, "-c", "import r0_jax; print(r0_jax.__file__)"], text=True, **options
    )
    assert where.startswith(str(tmp_path / "env"))

    calls = [(name, [flag]) for name in COMMANDS for flag in ("--help", "--wrong_flag=1")]
    # A config that is read, and then is wrong.
    wrong = ["--config.steps=0", f"--workdir={tmp_path / 'none'}"]
    calls += [("r0_jax.main", [f"--config=configs/{x}.py", *wrong]) for x in RECIPES[:-1]]
    calls += [("r0_jax.main", ["--config=configs/sdxl_r0.py:dryrun", *wrong])]
    calls += [("r0_jax.pretrain", ["--config=configs/shapes_base.py:none"])]
    results = forks.run(calls, python, **options)
    for (name, arguments), (status, out, err) in zip(calls, results, strict=True):
        said = f"{name} {arguments}: {err}"
        if arguments == ["--help"]:
            assert (status, err) == (0, "") and "flags:" in out, said
        else:
            assert (status, out) == (2, ""), said
            [line] = [line for line in err.splitlines() if line.startswith("error: ")]
            expected = (
                "unknown flag --wrong_flag"
                if arguments == ["--wrong_flag=1"]
                else "stage 'none' is unknown"
                if name == "r0_jax.pretrain"
                else "steps=0 must be at least 1"
            )
            assert expected in line, said
    assert not list(empty.iterdir())

    # The weights of the embedded world are those of the wheel.
    (empty / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    pipeline = Path(where.strip()).parent / "shapes" / "checkpoints" / "pipeline"
    run = [python, "-m", "r0_jax.sample", f"--pipeline={pipeline}", "--prompts=prompts.txt"]
    run += ["--out=images", "--num_inference_steps=1"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    assert (empty / "images" / "00000.png").is_file()


def test_an_editable_install_finds_its_recipes(source, tmp_path):
    python, empty = environment(tmp_path / "env"), tmp_path / "empty"
    pip("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", source, python=python)
    empty.mkdir()
    calls = [("r0_jax.main", ["--config=configs/sd3_r0.py:full", "--config.steps=0"])]
    options = {"cwd": empty, "env": variables(tmp_path)}
    [(status, out, err)] = forks.run(calls, python, **options)
    assert (status, out) == (2, "") and "steps=0 must be at least 1" in err
    imports = "import r0_jax, r0_jax.recipes.sdxl_r0 as m; print(r0_jax.__file__, m.__file__)"
    found = subprocess.check_output([python, "-c", imports], text=True, **options)
    assert found.split() == [f"{source}/r0_jax/__init__.py", f"{source}/configs/sdxl_r0.py"]
