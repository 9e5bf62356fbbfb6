"""The short form of `make fuzz`: cases of each target, the same ones every time."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CASES = 160


def test_spoiled_files_and_odd_flags_end_well():
    # A process of its own: a fork of this one, where JAX runs, could hang.
    program = [sys.executable, str(HERE / "support" / "fuzz.py")]
    done = subprocess.run(
        [*program, f"--cases={CASES}", "--seed=1", "--quick", "--jobs=2"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


BROKEN = """
import sys
sys.path.insert(0, "tests/support")
import fuzz, fuzz_targets
import numpy as np

def silent(path, folder, rng):
    return "a value that no such file may hold"

def fails(path, folder, rng):
    raise KeyError(path.name)

def hangs(path, folder, rng):
    while True:
        pass

def large(path, folder, rng):
    np.ones(2**40)

fuzz.CPU_SECONDS = 1

def build(world, whole):
    (world / "x").mkdir(parents=True)
    (world / "x" / "x").write_text("some text")

fuzz_targets.build = build
readers = (silent, fails, hangs, large)
fuzz.TARGETS = [fuzz_targets.Target("x", "x", "x", reader) for reader in readers]
print(*sorted({case.verdict for case in fuzz.run(range(16), 0, False, 2)}))
"""


def test_a_fault_is_found():
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], cwd=HERE.parent, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["hang", "memory", "silent", "traceback"], done.stderr
