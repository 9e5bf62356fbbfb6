"""Exports go to the Hub only when asked to: a stand-in of its server receives them."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

from r0_jax.errors import InputError
from r0_jax.export import hub


class StandIn(BaseHTTPRequestHandler):
    """Answers what the client asks to make a model and to commit small files to it."""

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "Invalid token"})
        elif self.path == "/api/whoami-v2":
            self.answer(200, {"name": "owner", "type": "user", "auth": {}})
        else:
            self.answer(404, {})

    def do_POST(self):
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://127.0.0.1:{self.server.server_port}/owner/name"
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            self.answer(self.server.status, {"url": url, "id": "owner/name"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif self.path.startswith("/api/models/owner/name/preupload/"):
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.startswith("/api/models/owner/name/commit/"):
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.message = lines[0]["value"]["summary"]
            self.server.files = {
                x["value"]["path"]: base64.b64decode(x["value"]["content"])
                for x in lines
                if x["key"] == "file"
            }
            self.answer(200, {"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer(404, {})

    def answer(self, status, fields):
        data = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), StandIn)
    server.asked, server.status = [], 200
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    files = {"README.md": b"# a card\n", "unet/config.json": b"{}", "unet/w.safetensors": bytes(99)}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path, files


def test_all_files_are_uploaded_to_a_private_model(server, folder):
    hub.check("owner/name")
    assert hub.push(folder[0], "owner/name", "Export step 3").endswith("/owner/name")
    assert server.files == folder[1] and server.message == "Export step 3"
    assert server.made["visibility"] == "private" and server.made["name"] == "name"


@pytest.mark.parametrize(
    "name, token, said",
    [
        ("a b", "hf_right", "write owner/name"),
        ("owner/name", "hf_wrong", "has no right to write there .HTTP 401"),
        ("owner/name", "", "run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_what_cannot_be_uploaded_is_an_error_before_the_export(
    server, monkeypatch, tmp_path, name, token, said
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=said):
        hub.check(name)
    assert not any("create" in path for path in server.asked)


def test_an_upload_that_fails_says_that_the_export_is_there(server, folder, monkeypatch):
    server.status = 403
    with pytest.raises(InputError, match=r"is written, but not uploaded .*HTTP 403.*`hf upload "):
        hub.push(folder[0], "owner/name", "Export")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="cannot be reached"):
        hub.check("owner/name")
