"""An S3 server with faults on request: moto in a thread of this process, or in front of a real object store (tests/weed.py).

TERRACE_TEST_STORE=seaweedfs, which `make test-s3` sets, has every test that asks for a server use the real one.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from weed import Weed
from weed import running as running_weed
from werkzeug.serving import make_server

ACCESS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class S3Server:
    """`fault(request number, method) -> status, (status, S3's error code) or None` decides which requests fail.

    `ignored` names conditional headers that the server overlooks, as some do; requests under an access key in `expired` are refused as
    those of a token that ran out. Between `stop()` and `start()` nobody listens at `url`; what is stored stays.
    """

    url: str
    stop: Callable[[], None] = lambda: None
    start: Callable[[], None] = lambda: None
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, range)
    fault: Callable[[int, str], int | tuple[int, str] | None] | None = None
    ignored: tuple[str, ...] = ()
    expired: set[str] = field(default_factory=set)
    weed: Weed | None = None  # the real store behind it, where there is one
    failed: int = 0


@lru_cache(maxsize=1)
def _store_of_process(process: int) -> Weed:
    """A real store takes seconds to start: one for all tests of a process, which ends with it."""
    import atexit

    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(running_weed(Path(tempfile.mkdtemp(prefix="terrace-weed-"))))


@contextmanager
def serve_s3(weed: Weed | None = None) -> Iterator[S3Server]:
    """Serve until the block ends, on a free port of this machine. What earlier servers of this process stored is gone.

    `weed`: the store behind it; by default moto, or the process's own store where TERRACE_TEST_STORE says so.
    """
    if weed is None and os.environ.get("TERRACE_TEST_STORE") == "seaweedfs":
        weed = _store_of_process(os.getpid())
    moto = None if weed is not None else DomainDispatcherApplication(create_backend_app)
    numbers, lock, conditional = itertools.count(), threading.Lock(), threading.Lock()
    state = S3Server("", weed=weed)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        method = environ["REQUEST_METHOD"]
        with lock:
            number = next(numbers)
            state.requests.append((method, environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
            status = state.fault(number, method) if state.fault is not None else None
            if any(f"Credential={key}/" in environ.get("HTTP_AUTHORIZATION", "") for key in state.expired):
                status = (400, "ExpiredToken")
            state.failed += status is not None
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = status if isinstance(status, tuple) else (status, "SlowDown")
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>asked for by a test</Message></Error>".encode()
            body = b"" if method == "HEAD" else body
            start_response(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        names = {header: f"HTTP_{header.upper().replace('-', '_')}" for header in state.ignored}
        dropped = [header for header, name in names.items() if environ.pop(name, None) is not None]
        if weed is not None:
            return weed.forward(environ | {"terrace.dropped": dropped}, start_response)
        if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
            with conditional:  # moto looks first and writes then; on S3 nothing comes in between
                return moto(environ, start_response)
        return moto(environ, start_response)

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
    if weed is not None:
        weed.clear()
    else:
        reset = urllib.request.Request(f"{state.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=30).close()
    state.requests.clear()
    try:
        yield state
    finally:
        stop()
