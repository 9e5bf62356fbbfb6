"""Every mistake on a command line is one line on stderr and status 2; bugs keep tracebacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '''
"""Do the thing."""
import errno, os, signal
from absl import flags, logging
from r0_jax import cli
from r0_jax.errors import InputError, of_config

CONFIG = cli.define_config()
OUT = cli.define_path("out", None, "where to write")
PARTS = cli.define_named_paths("parts", "what of")
COUNT = flags.DEFINE_integer("count", 1, "how many")
SCALE = flags.DEFINE_float("scale", 1.0, "how much")
EMA = flags.DEFINE_bool("ema", True, "whether")
FAIL = flags.DEFINE_string("fail", "", "how main ends")
flags.mark_flag_as_required("out")

def main(argv):
    if FAIL.value == "input":
        raise InputError("prompts.txt has no prompts")
    if FAIL.value == "config":
        with of_config():
            raise InputError("steps=0 must be at least 1")
    if FAIL.value == "interrupt":
        # A shell's background jobs ignore SIGINT, and so would this child of theirs.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
    if FAIL.value == "bug":
        {}["a bug"]
    if FAIL.value == "missing":
        open("not/there")
    if FAIL.value == "tensorstore":
        error = ValueError('Error writing to local file "/w/ck/": No space left on device '
                           "[os_error_code='28']")
        try:
            raise error
        except ValueError:
            logging.error("thread died", exc_info=True)
        raise error
    if FAIL.value == "array_record":
        raise RuntimeError('Failed to finalize "train": write() failed: No space left on device; '
                           "writing /w/prompts.tmp/a; at byte 9; Failed to close chunk_writer")
    if FAIL.value in errno.errorcode.values():
        number = getattr(errno, FAIL.value)
        raise OSError(number, os.strerror(number), "/w/metrics.jsonl")
    if FAIL.value == "log":
        logging.info("noise")
        logging.warning("careful")
    if FAIL.value == "name":
        return print(cli.config_name())
    if FAIL.value == "steps":
        return print(CONFIG.value.steps, CONFIG.value.lora.rank)
    if FAIL.value == "draw":
        import jax
        return print(jax.random.normal(jax.random.key(3), (3,)))
    if FAIL.value == "chinese":
        import rich.console
        rich.console.Console().print("一只猫")
        return print(OUT.value)
    config = CONFIG.value
    if FAIL.value == "paths":
        return print(OUT.value, PARTS.value, config.pretrained, *config.rewards.a.values())
    print(config.steps, config.lora.rank, config.mesh, config.ema, COUNT.value)

cli.run(main)
'''

BASE = """
from ml_collections import ConfigDict

def get_config(variants=""):
    config = ConfigDict({
        "steps": 10, "learning_rate": 1e-4, "ema": True, "mesh": (1, 8), "layers": ["mid"],
        "optional": None, "lora": {"rank": 4, "alpha": 1.0},
    })
    return config.lock()
"""

PATHS = """
from ml_collections import ConfigDict

def get_config():
    entry = {"path": "models/a", "head": "", "type": "clip_score"}
    return ConfigDict({"pretrained": "~/base", "rewards": {"a": entry}})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "base.py").write_text(BASE, encoding="utf-8")
    return folder


def call(
    folder: Path, *arguments: str, env: dict | None = None, program: str = "program.py"
) -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def error_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def test_good_flags_and_overrides_reach_main(folder):
    overrides = ["--config.lora.rank=8", "--config.mesh=2,4", "--noconfig.ema", "--config.steps=3"]
    result = call(folder, "--config=base.py", *overrides, "--out=o", "--count=5")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "3 8 (2, 4) False 5\n"


@pytest.mark.parametrize(
    "config, name",
    [
        ("base.py", "base"),
        ("./base.py:r0plus,full", "base_r0plus_full"),
        ("base.py:a/b", "base_a_b"),
    ],
)
def test_a_config_has_a_name(folder, config, name):
    result = call(folder, f"--config={config}", "--out=o", "--fail=name")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"{name}\n")


def test_a_home_folder_is_expanded_in_flags(folder, tmp_path):
    flags = ["--config=~/own.py", "--out=~/o", "--parts=a=~/x,b:c=y,d=e:f", "--fail=paths"]
    (tmp_path / "own.py").write_text(PATHS, encoding="utf-8")
    result = call(folder, *flags, env={"HOME": str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, "")
    home = tmp_path
    assert result.stdout.startswith(f"{home}/o ['a={home}/x', 'b:c=y', 'd=e:f'] {home}/base ")
    assert error_line(call(folder, "--config=base.py", "--out=")) == "--out is empty"


def test_paths_of_a_config_are_absolute_and_other_fields_stay(folder, tmp_path):
    (folder / "own.py").write_text(PATHS, encoding="utf-8")
    flags = ["--config=own.py", "--out=o", "--config.pretrained=gs://b/x", "--fail=paths"]
    result = call(folder, *flags, "--config.rewards.a.head=~/h", env={"HOME": str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"o None gs://b/x {tmp_path}/h {folder}/models/a clip_score\n"


def test_an_invalid_config_is_told_with_its_file(folder):
    line = error_line(call(folder, "--config=base.py", "--out=o", "--fail=config"))
    assert line == "base.py: steps=0 must be at least 1"


def test_a_config_that_holds_itself_is_told(folder):
    source = BASE + "before = get_config\ndef get_config():\n    config = before()\n"
    source += "    with config.unlocked():\n        config.more = config\n    return config\n"
    (folder / "circle.py").write_text(source, encoding="utf-8")
    line = error_line(call(folder, "--config=circle.py", "--out=o"))
    assert line.startswith("circle.py: the section 'more' of the config holds itself")


def test_a_recipe_imports_what_lies_beside_it(folder, tmp_path):
    (tmp_path / "beside_the_recipe.py").write_text(BASE, encoding="utf-8")
    source = "from beside_the_recipe import get_config\n"
    (tmp_path / "recipe.py").write_text(source, encoding="utf-8")
    result = call(folder, f"--config={tmp_path / 'recipe.py'}", "--out=o")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "10 4 (1, 8) True 1\n"


def test_recipes_of_the_package_are_found_from_any_folder(folder, tmp_path):
    flags = ["--out=o", "--fail=steps"]
    result = call(folder, "--config=configs/sdxl_r0.py:full", *flags)
    assert (result.returncode, result.stdout) == (0, "2000 0\n"), result.stderr
    result = call(folder, "--config=./configs/sdxl_r0.py:full", *flags)
    assert (result.returncode, result.stdout) == (0, "2000 0\n"), result.stderr
    # What lies in the current folder comes first.
    (folder / "configs").mkdir()
    (folder / "configs" / "sdxl_r0.py").write_text(BASE, encoding="utf-8")
    result = call(folder, "--config=configs/sdxl_r0.py:full", *flags)
    assert (result.returncode, result.stdout) == (0, "10 4\n"), result.stderr
    for missing in ("configs/sdxl.py", "sdxl_r0.py", "other/configs/sdxl_r0.py"):
        line = error_line(call(folder, f"--config={missing}", *flags))
        assert line.startswith(f"config file {missing}: no such file or directory; r0_jax comes ")
        assert "configs/sdxl_r0.py" in line and "__init__" not in line


@pytest.mark.parametrize("first", ["", "import jax\n"])
def test_a_seed_draws_the_same_in_every_shell(folder, first):
    name = f"draws{len(first)}.py"
    (folder / name).write_text(first + PROGRAM, encoding="utf-8")
    flags = ["--config=base.py", "--out=o", "--fail=draw"]
    plain = call(folder, *flags, program=name, env={"JAX_ENABLE_X64": "0"})
    assert (plain.returncode, plain.stderr) == (0, "")
    changed = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "7",
    }
    result = call(folder, *flags, program=name, env=changed)
    assert (result.returncode, result.stdout) == (0, plain.stdout)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("warning: ")
    assert all(f"{option}={value}" in result.stderr for option, value in changed.items())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8_does_not_end_a_command(folder, encoding):
    flags = ["--config=base.py", "--out=图", "--fail=chinese"]
    result = call(folder, *flags, env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == r"\u4e00\u53ea\u732b" + "\n" + r"\u56fe" + "\n"


def test_help_prints_usage_and_succeeds(folder):
    result = call(folder, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert "Do the thing." in result.stdout
    assert "--config" in result.stdout and "--out: where to write" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing --config=... and --out=... (see --help)"),
        (["--out=o"], "missing --config=... (see --help)"),
        (["--outt=o"], "unknown flag --outt; did you mean --out?"),
        (["--count=x"], "--count=x: expected an integer"),
        (["--ema=maybe"], "--ema=maybe: expected true or false"),
        (["--config=base.py", "--out="], "--out is empty"),
        (["--config=base.py", "--out=o", "--scale=nan"], "--scale=nan is not a number"),
        (["--config.steps=3"], "--config.steps overrides a config file: give --config=FILE.py too"),
        (["--config=base.py", "--out=o", "--scale=inf"], "--scale=inf is not a finite number"),
        (["--noema=x"], "--noema=x does not take an argument; flags are --name=value"),
        (
            ["--flagfile=/dev/zero"],
            "/dev/zero is a pipe or a device, not a file: give a regular file",
        ),
        (
            ["--config=base.py", "--out=o", "--config.lora=x"],
            "--config.lora is a section of the config: set one of its fields, such as "
            "--config.lora.rank",
        ),
    ],
)
def test_bad_flag(folder, arguments, message):
    assert error_line(call(folder, *arguments)) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=8", 'the config has no field "lora.rnak"; did you mean "lora.rank"?'),
        ("rank=8", 'the config has no field "rank"; did you mean "lora.rank"?'),
        ("steps.x=8", 'the config has no field "steps.x"; did you mean "steps"?'),
        (
            "zzz=8",
            'the config has no field "zzz"; it has ema, layers, learning_rate, lora, mesh, '
            "optional, steps",
        ),
        ("steps=many", "--config.steps=many: expected an integer"),
        ("steps=1.5", "--config.steps=1.5: expected an integer"),
        ("learning_rate=fast: er", "--config.learning_rate=fast: er: expected a number"),
        ("ema=maybe", "--config.ema=maybe: expected true or false"),
        (
            "layers=up",
            "--config.layers is a list and cannot be set on the command line; "
            "set it in the config file",
        ),
    ],
)
def test_bad_override(folder, override, message):
    assert error_line(call(folder, "--config=base.py", f"--config.{override}")) == message


def test_value_after_a_space_is_not_taken_for_true(folder):
    line = error_line(call(folder, "--config=base.py", "--out=o", "--ema", "false"))
    assert line == "unexpected argument 'false'; flags are --name=value"


def test_unknown_flag_that_is_a_config_field(folder):
    line = error_line(call(folder, "--config=base.py", "--steps=3"))
    assert line == "unknown flag --steps; did you mean --config.steps?"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "config file recipe.py: no such file or directory"),
        ("def get_config(:\n", "recipe.py, line 1: invalid syntax"),
        ("steps = 3\n", "config file recipe.py does not define get_config()"),
        ("def get_config():\n  pass\n", "recipe.py: get_config() returned NoneType"),
        (
            "from r0_jax.errors import InputError\n"
            "def get_config():\n  raise InputError('variant x is unknown')\n",
            "recipe.py: variant x is unknown",
        ),
        ("\nimport nothing_like_it\n", "recipe.py, line 2: ModuleNotFoundError"),
        ("def get_config():\n  return steps\n", "recipe.py, line 2: NameError: name 'steps'"),
        ("def get_config(size):\n  pass\n", "recipe.py: TypeError: get_config() missing 1"),
        (
            "import base\ndef get_config():\n  c = base.get_config()\n  c.lora.rnak = 3\n",
            'recipe.py, line 4: KeyError: Key "rnak" does not exist and cannot be added since '
            'the config is locked. Did you mean "rank" instead of "rnak"?',
        ),
    ],
)
def test_bad_config_file(folder, source, message):
    recipe = folder / "recipe.py"
    recipe.unlink(missing_ok=True)
    if source is not None:
        recipe.write_text(source, encoding="utf-8")
    assert error_line(call(folder, "--config=recipe.py", "--out=o")).startswith(message)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("input", "prompts.txt has no prompts"),
        (
            "ENOSPC",
            "/w/metrics.jsonl: no space left on device; free some space or choose another folder",
        ),
        ("EROFS", "/w/metrics.jsonl: read-only file system; choose a folder that can be written"),
        (
            "EACCES",
            "/w/metrics.jsonl: permission denied; change its permissions or choose another one",
        ),
        (
            "ENAMETOOLONG",
            "/w/metrics.jsonl: file name too long; give the path of a file or folder",
        ),
        (
            "tensorstore",
            "/w/ck/: no space left on device; free some space or choose another folder",
        ),
        (
            "array_record",
            "/w/prompts.tmp/a: no space left on device; free some space or choose another folder",
        ),
    ],
)
def test_error_in_main_that_the_user_can_mend(folder, fail, message):
    assert error_line(call(folder, "--config=base.py", "--out=o", f"--fail={fail}")) == message


@pytest.mark.parametrize("fail", ["bug", "missing"])
def test_bug_keeps_its_traceback(folder, fail):
    result = call(folder, "--config=base.py", "--out=o", f"--fail={fail}")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert ("a bug" if fail == "bug" else "not/there") in result.stderr


def test_interrupt_is_silent(folder):
    result = call(folder, "--config=base.py", "--out=o", "--fail=interrupt")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_log_is_on_stderr_from_warnings_on(folder):
    result = call(folder, "--config=base.py", "--out=o", "--fail=log")
    assert "careful" in result.stderr and "noise" not in result.stderr
    assert result.stdout == "10 4 (1, 8) True 1\n"
    assert "noise" in call(folder, "--config=base.py", "--out=o", "--fail=log", "-v=0").stderr
