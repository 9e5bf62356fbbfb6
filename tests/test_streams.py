"""Commands whose output nobody reads, and signals that come at odd moments."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = '''
import atexit, gc, os, signal, sys, time, warnings
from absl import app, flags, logging
from r0_jax import cli, files
from pathlib import Path

HOW = flags.DEFINE_string("how", "", "what happens")

class Callback:
    """JAX has one, too; Python drops what is raised in it."""
    fired = False
    def __call__(self, phase, info):
        if phase == "start" and not self.fired:
            Callback.fired = True
            os.kill(os.getpid(), getattr(signal, HOW.value))

def main(argv):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    if HOW.value == "print":
        warnings.warn("careful")
        print("x" * 100_000)
        Path("done").write_text("")
        return
    if HOW.value == "log":
        logging.warning("a name: %s", "\\x1b[2J\\n\\u202eb")
        return
    if HOW.value == "building":
        with files.building(Path("out")) as folder:
            (folder / "large").write_text("")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    if HOW.value == "after the end":
        atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))
        return
    gc.callbacks.append(Callback())
    gc.collect()
    time.sleep(60)

cli.run(main)
'''

# Starts a command as `python -m` does, and sends it a signal as it is about to import a module.
STARTING = """
import os, runpy, signal, sys, time
command, module, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it

class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), number)
                time.sleep(60)
            except BaseException:  # as some libraries do
                raise ImportError(name) from None

sys.meta_path.insert(0, Finder)
sys.argv = [command, "--help"]
runpy.run_module(command, run_name="__main__", alter_sys=True)
"""
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in sorted(ROOT.joinpath("r0_jax").rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text("utf-8")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "program.py").write_text(PROGRAM, "utf-8")

    def call(how, closing="", **streams):
        shell = ["sh", "-c", f'exec "$@" {closing}', "sh"]
        done = subprocess.run(
            [*shell, sys.executable, "program.py", f"--how={how}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=50,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        )
        return folder, done.returncode, (done.stderr or b"").decode()

    return call


def test_a_reader_that_goes_away_ends_nothing(run):
    reader, writer = os.pipe()
    os.close(reader)
    folder, status, said = run("print", stdout=writer)
    os.close(writer)
    assert (status, said) == (0, "warning: careful\n") and (folder / "done").exists()


def test_warnings_that_cannot_be_written_end_nothing(run):
    with open("/dev/full", "w") as full:
        _, status, _ = run("print", stderr=full)
    assert status == 0


def test_a_result_that_cannot_be_written_is_an_error(run):
    with open("/dev/full", "w") as full:
        _, status, said = run("print", stdout=full)
    assert status == 2 and "error: stdout: no space left on device" in said


def test_closed_streams_end_nothing_and_no_file_takes_their_place(run):
    assert run("print", ">&- 2>&-")[1] == 0


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(run, name, status):
    _, found, said = run(name)
    assert (found, said) == (status, "")


@pytest.mark.parametrize(
    ("command", "module", "number"),
    [(command, "absl", signal.SIGINT) for command in COMMANDS]
    + [("r0_jax.sample", "jax.numpy", signal.SIGINT), ("r0_jax.main", "absl", signal.SIGTERM)],
)
def test_a_signal_during_the_imports_ends_a_command_without_a_word(command, module, number):
    """Several seconds of a start are imports, where people notice a mistyped flag."""
    done = subprocess.run(
        [sys.executable, "-c", STARTING, command, module, str(int(number))],
        cwd=ROOT,
        capture_output=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, b"", b"")


def test_a_signal_after_the_end_is_told_without_a_traceback(run):
    _, status, said = run("after the end")
    assert (status, said) == (130, "")


def test_sigterm_leaves_nothing_unfinished(run):
    folder, status, said = run("building")
    assert (status, said) == (143, "") and not list(folder.glob(".out.*"))


def test_control_characters_of_a_log_line_are_escaped(run):
    _, _, said = run("log")
    assert r"a name: \x1b[2J" in said and r"\u202eb" in said and "\x1b" not in said
