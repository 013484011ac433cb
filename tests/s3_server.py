"""A real S3-protocol server (moto) in a thread of this process, with faults on request."""

from __future__ import annotations

import itertools
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ACCESS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class S3Server:
    """`fault(request number, method) -> status, (status, S3's error code) or None` decides which requests fail.

    `ignored` names conditional headers that the server overlooks, as some do. Between `stop()` and `start()` nobody listens at `url`;
    what is stored stays.
    """

    url: str
    stop: Callable[[], None] = lambda: None
    start: Callable[[], None] = lambda: None
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, range)
    fault: Callable[[int, str], int | tuple[int, str] | None] | None = None
    ignored: tuple[str, ...] = ()
    failed: int = 0


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Serve until the block ends, on a free port of this machine. What earlier servers of this process stored is gone."""
    backend = DomainDispatcherApplication(create_backend_app)
    numbers, lock, conditional = itertools.count(), threading.Lock(), threading.Lock()
    state = S3Server("")

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        method = environ["REQUEST_METHOD"]
        with lock:
            number = next(numbers)
            state.requests.append((method, environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
            status = state.fault(number, method) if state.fault is not None else None
            state.failed += status is not None
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = status if isinstance(status, tuple) else (status, "SlowDown")
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>asked for by a test</Message></Error>".encode()
            body = b"" if method == "HEAD" else body
            start_response(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        for header in state.ignored:
            environ.pop(f"HTTP_{header.upper().replace('-', '_')}", None)
        if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
            with conditional:  # moto looks first and writes then; on S3 nothing comes in between
                return backend(environ, start_response)
        return backend(environ, start_response)

    running: list[tuple[Any, threading.Thread]] = []
    port = 0

    def start() -> None:
        server = make_server("127.0.0.1", port, application, threaded=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        running.append((server, thread))

    def stop() -> None:
        while running:
            server, thread = running.pop()
            server.shutdown()
            server.server_close()
            thread.join(10)

    start()
    port = running[0][0].server_port
    state.url, state.start, state.stop = f"http://127.0.0.1:{port}", start, stop
    reset = urllib.request.Request(f"{state.url}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=30).close()
    state.requests.clear()
    try:
        yield state
    finally:
        stop()
