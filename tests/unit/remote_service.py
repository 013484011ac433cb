"""A reward service that misbehaves, for tests: the first part of the path says how."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        mode = self.path.strip("/").split("/")[0]
        count = len(json.loads(self.rfile.read(int(self.headers["content-length"])))["items"])
        with contextlib.suppress(OSError):
            self._misbehave(mode, count)

    def _misbehave(self, mode: str, count: int) -> None:
        bodies = {
            "good": json.dumps({"scores": [{"value": 0.5}] * count}),
            "html": "<html>please log in</html>",
            "list": json.dumps([0.5] * count),
            "numbers": json.dumps({"scores": [0.5] * count}),
            "texts": json.dumps({"scores": [{"value": "0.5"}] * count}),
            "other-key": json.dumps({"rewards": [0.5] * count}),
            "no-value": json.dumps({"scores": [{"score": 0.5}] * count}),
            "few": json.dumps({"scores": [{"value": 0.5}]}),
            "empty": "",
            "large": "x" * 10_000_000,
        }
        if mode == "close":
            self.connection.close()
        elif mode == "redirect":
            self.send_response(302)
            self.send_header("location", "/good/score")
            self.end_headers()
        elif mode.startswith("drip"):
            start = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" if mode == "drip-body" else b"HTTP/1.1 200 OK\r\nx: "
            self.connection.sendall(start)
            for _ in range(600):
                self.connection.sendall(b" ")
                time.sleep(0.1)
        else:
            body = bodies[mode].encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextlib.contextmanager
def misbehaving_service() -> Iterator[str]:
    """Its URL, while it runs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
