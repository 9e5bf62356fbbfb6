"""What holds for every command: modules that `python -m` starts."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("r0_jax", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text("utf-8")
    and path.parent.name != "programs"  # files that the Pythons of other projects start
]


def test_importing_all_commands_in_one_process_defines_no_flag():
    assert {"r0_jax.main", "r0_jax.sample", "r0_jax.plan.__main__"} <= set(COMMANDS)
    program = f"""
import importlib
from absl import flags
for name in {COMMANDS}:
    importlib.import_module(name)
    # Packages such as jax and grain have flags of their own.
    own = {{flag.name for flag in flags.FLAGS.flags_by_module_dict().get(name, [])}}
    assert not own, (name, own)
    assert "config" not in flags.FLAGS and "workdir" not in flags.FLAGS, name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_importing_the_training_command_leaves_slow_packages_alone():
    slow = {"transformers", "tensorflow_datasets", "grain", "matplotlib", "orbax", "scipy", "torch"}
    slow |= {"tensorflow", "jax.experimental.pallas.ops.tpu.splash_attention"}
    program = f"import sys, r0_jax.main; print(*{slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


# Flags of text that hold no path; every other one is made by `cli.define_path`, for its `~`.
TEXTS = {
    "architecture",
    "base_model",
    "check",
    "column",
    "host",
    "id_column",
    "language",
    "model_name",
    "only",
    "push_to_hub",
    "step",
    "task",
    "topology",
}


def test_every_flag_that_holds_a_path_knows_the_home_folder():
    program = f"""
import importlib
from absl import flags
paths = set()
for name in {COMMANDS}:
    if name.startswith("r0_jax."):
        module, before = importlib.import_module(name), set(flags.FLAGS)
        module.define_flags()
        new = set(flags.FLAGS) - before
        text = {{n for n in new if type(flags.FLAGS[n].parser) is flags.ArgumentParser}}
        assert text <= {TEXTS}, (name, text - {TEXTS})
        paths |= {{n for n in new if flags.FLAGS[n].parser.flag_type() == "path"}}
        for n in new:
            delattr(flags.FLAGS, n)
print(*sorted(paths))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert {"workdir", "out", "prompts", "pretrained", "images", "tokenizer"} <= {
        *done.stdout.split()
    }
