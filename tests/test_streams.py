"""Commands whose output nobody reads, and signals that come at odd moments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '''
import gc, os, signal, sys, time, warnings
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
    gc.callbacks.append(Callback())
    gc.collect()
    time.sleep(60)

cli.run(main)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "program.py").write_text(PROGRAM, "utf-8")
    root = str(Path(__file__).parent.parent)

    def call(how, closing="", **streams):
        shell = ["sh", "-c", f'exec "$@" {closing}', "sh"]
        done = subprocess.run(
            [*shell, sys.executable, "program.py", f"--how={how}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": root},
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


@pytest.mark.parametrize(("signal", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(run, signal, status):
    _, found, said = run(signal)
    assert (found, said) == (status, "")


def test_sigterm_leaves_nothing_unfinished(run):
    folder, status, said = run("building")
    assert (status, said) == (143, "") and not list(folder.glob(".out.*"))


def test_control_characters_of_a_log_line_are_escaped(run):
    _, _, said = run("log")
    assert r"a name: \x1b[2J" in said and r"\u202eb" in said and "\x1b" not in said
