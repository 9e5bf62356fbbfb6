"""As much of Google's storage API as tensorstore speaks, over the folder that plays the store."""

import http.server
import threading
import urllib.parse
from pathlib import Path

import pytest
from orbax.checkpoint._src.path import gcs_utils


class _Handler(http.server.BaseHTTPRequestHandler):
    root: Path

    def do_GET(self):
        url, asked = self._split()
        bucket, name = url.path.removeprefix("/storage/v1/b/").split("/o", 1)
        path = self.root / bucket / urllib.parse.unquote(name.strip("/"))
        if not name.strip("/"):
            files = [
                p.relative_to(self.root / bucket).as_posix()
                for p in (self.root / bucket).rglob("*")
                if p.is_file()
            ]
            items = ", ".join(
                f'{{"name": "{f}", "generation": "1", "size": "1"}}'
                for f in files
                if f.startswith(asked.get("prefix", [""])[0])
            )
            self._answer(200, f'{{"items": [{items}]}}'.encode())
        elif not path.is_file():
            self._answer(404)
        else:
            data, status, where = path.read_bytes(), 200, None
            if (wanted := self.headers.get("Range")) and data:
                first, last = wanted.removeprefix("bytes=").split("-")
                size, data = len(data), data[int(first) : int(last) + 1 if last else None]
                status, where = 206, f"bytes {first}-{int(first) + len(data) - 1}/{size}"
            self._answer(status, data, path, where)

    def do_POST(self):
        url, asked = self._split()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        bucket = url.path.removeprefix("/upload/storage/v1/b/").split("/")[0]
        path = self.root / bucket / asked["name"][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._answer(
            200,
            f'{{"name": "{asked["name"][0]}", "generation": "{_generation(path)}"}}'.encode(),
            path,
        )

    def _split(self):
        url = urllib.parse.urlsplit(self.path)
        return url, urllib.parse.parse_qs(url.query)

    def _answer(self, status: int, data: bytes = b"", path: Path | None = None, where=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if path:
            self.send_header("x-goog-generation", _generation(path))
        if where:
            self.send_header("Content-Range", where)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def _generation(path: Path) -> str:
    return str(path.stat().st_mtime_ns)


@pytest.fixture
def gcs(store, monkeypatch):
    """tensorstore's gs:// is the test's store; orbax does not ask Google's client of buckets."""
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    handler = type("Handler", (_Handler,), {"root": store})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()
