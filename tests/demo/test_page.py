"""The page; without gradio nothing is tested."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio")

from r0_jax.demo import page
from r0_jax.demo.studio import Drawing

ROOT = Path(__file__).parents[2]
USUAL = ["a cat", 0, 25, 7.5, 4, 1]
BOUNDS = [(1, 50), (1, 20)] * 2


def test_a_link_restores_a_setting():
    text = page.link_of('红 & <b>"x"</b>', 7, [30, 2.5, 4, 1])
    assert "<b>" not in text and text.count('"') == 4  # nothing breaks out of the address
    address = re.search(r'href="\?([^"]*)"', text)[1].replace("&amp;", "&")
    query = dict(urllib.parse.parse_qsl(address))
    assert page.restored(query, USUAL, BOUNDS) == ['红 & <b>"x"</b>', 7, 30, 2.5, 4, 1]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, USUAL),
        ({"seed": "x", "set": "1,2"}, USUAL),
        ({"seed": "-1", "set": "0,2,nan,inf"}, ["a cat", 0, 25, 2.0, 4, 1]),
        ({"seed": str(2**32)}, USUAL),
        ({"prompt": "x" * 5000}, ["x" * 1000, *USUAL[1:]]),
    ],
)
def test_a_link_that_asks_for_what_is_not_there(query, expected):
    assert page.restored(query, USUAL, BOUNDS) == expected


def test_what_stands_under_an_image():
    text = page.caption_of(Drawing(np.zeros((2, 2, 3)), 1.234, True, 50, {"a|b": 0.12341}))
    assert "50 network calls, 1.23 s (compiled just now)" in text and "| a\\|b | 0.1234 |" in text
    assert (
        page.caption_of(Drawing(np.zeros((2, 2, 3)), 1, False, 1, {})) == "1 network call, 1.00 s"
    )


def test_served_to_programs_and_to_a_browser():
    """Gradio leaves sockets to the garbage collector, which would fail whatever test comes next."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:unraisableexception"]
    command += ["-p", "no:threadexception", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/demo/served_page.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_the_command_serves_the_embedded_world_until_ctrl_c(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "r0_jax.demo", f"--runs={tmp_path}", f"--port={port}"]
    behind = os.environ | dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=behind, **streams) as child:
        try:
            assert child.stdout.readline() == b"models: base, base in 4 steps\n"
            assert f"open http://127.0.0.1:{port}/ in".encode() in child.stdout.readline()
            taken = subprocess.run(command, capture_output=True, text=True, check=False)
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130 and b"Traceback" not in err
    [line] = [line for line in taken.stderr.splitlines() if line.startswith("error: ")]
    assert taken.returncode == 2 and f"cannot serve on 127.0.0.1, port {port}: it is in use" in line
    assert "Traceback" not in taken.stderr
