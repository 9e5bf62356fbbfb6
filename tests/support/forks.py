"""Many commands, a fork each of one process: importing JAX anew would take most of their time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fast_xla

ROOT = Path(__file__).parents[2]

# Runs `python -m MODULE ARGUMENTS` for each pair. PyTorch and its friends cannot be imported.
PROGRAM = """
import importlib, json, os, runpy, sys, tempfile, traceback
for name in ("torch", "diffusers", "peft", "accelerate"):
    sys.modules[name] = None
calls = json.loads(sys.argv[1])
for module in dict.fromkeys(module for module, _ in calls):
    importlib.import_module(module)
    del sys.modules[module]
results = []
for module, arguments in calls:
    files = [tempfile.TemporaryFile() for _ in range(2)]
    if not (child := os.fork()):
        for i, file in enumerate(files):
            os.dup2(file.fileno(), i + 1)
        if arguments[0].startswith("limit="):
            import resource
            limit = int(arguments.pop(0).removeprefix("limit="))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = [module, *arguments]
        status = 0
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking all modules down would take seconds
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [file.seek(0) or file.read().decode() for file in files]
    results.append([status, *texts])
print(json.dumps(results))
"""


def run(calls, python=sys.executable, cwd=ROOT, env=None):
    """[(exit status, stdout, stderr)] of each (module, arguments)."""
    calls = [(module, [str(argument) for argument in arguments]) for module, arguments in calls]
    result = subprocess.run(
        [python, "-c", PROGRAM, json.dumps(calls)],
        cwd=cwd,
        env=(env or os.environ) | {"XLA_FLAGS": fast_xla.FLAGS, **fast_xla.KEEP},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
