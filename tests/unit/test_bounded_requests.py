"""Every request to S3 ends, whatever the store does with it: takes no body, gives no answer, lets one drip."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import s3_server

from terrace.recipe.schema import Storage
from terrace.storage import bounded
from terrace.storage.conditional import copy_object, list_objects, read_versioned, remove, store_copy, write_if
from terrace.storage.faults import StorageError
from terrace.storage.files import read_file, read_ranges, write_file

STARTED = b'<?xml version="1.0"?><InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>'
PLACE = "s3://bucket/object"
TOO_LONG_S = 20.0


def answer(connection: socket.socket, body: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def silent(connection: socket.socket, request: bytes) -> None:
    """Nothing, not even `100 Continue`."""


def silent_about_parts(connection: socket.socket, request: bytes) -> None:
    """A store that dies once a large upload has begun."""
    if request.startswith(b"POST") and b"uploads" in request.split(b"\r\n")[0]:
        answer(connection, STARTED)
    if request.startswith(b"DELETE"):
        answer(connection, b"")


def dripping(connection: socket.socket, request: bytes) -> None:
    """An answer that is never silent for long, and never whole."""
    connection.sendall(b'HTTP/1.1 206 Partial Content\r\nContent-Length: 100000\r\nETag: "e"\r\n\r\n')
    for _ in range(int(2 * TOO_LONG_S / 0.02)):
        connection.sendall(b"x")
        time.sleep(0.02)


@contextmanager
def store(behaviour) -> Iterator[Storage]:
    """Settings of a store that treats every connection's requests in that way."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def serve(connection: socket.socket) -> None:
            try:
                while request := connection.recv(65536):
                    behaviour(connection, request)
            except OSError:
                pass

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield Storage(endpoint_url=f"http://127.0.0.1:{listener.getsockname()[1]}", max_attempts=1, timeout_seconds=0.15)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Large enough to go up in parts, and nothing on the disk."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(101 * 2**20)
    return path


CASES = {
    "conditional write": (silent, lambda at, large: write_if(PLACE, b"{}", None, at)),
    "write": (silent, lambda at, large: write_file(PLACE, b"{}", at)),
    "read": (silent, lambda at, large: read_versioned(PLACE, at)),
    "list": (silent, lambda at, large: list_objects("s3://bucket/folder", at)),
    "delete": (silent, lambda at, large: remove([PLACE], at)),
    "copy": (silent, lambda at, large: copy_object(PLACE, f"{PLACE}-copy", at)),
    "range": (silent, lambda at, large: read_ranges(PLACE, [(0, 1000)], at)),
    "whole file": (silent, lambda at, large: read_file(PLACE, at)),
    "part of an upload": (silent_about_parts, lambda at, large: store_copy(large, PLACE, at)),
    "range that drips": (dripping, lambda at, large: read_ranges(PLACE, [(0, 100_000)], at)),
    "object that drips": (dripping, lambda at, large: read_versioned(PLACE, at)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_request_is_given_up_though_it_is_not_answered_or_never_whole(case: str, large: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3_server.ACCESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bounded, "SLOWEST_BYTES_PER_SECOND", 10**9)
    behaviour, act = CASES[case]
    ended: list[BaseException] = []

    def attempt(settings: Storage) -> None:
        try:
            act(settings, large)
        except BaseException as error:
            ended.append(error)

    with store(behaviour) as settings:
        thread = threading.Thread(target=attempt, args=(settings,), daemon=True)
        thread.start()
        thread.join(TOO_LONG_S)
        assert not thread.is_alive(), "it waits for ever"
    assert isinstance(ended[0], StorageError), ended
    assert "still failing after 1 tries" in str(ended[0])


def test_bytes_are_given_time():
    assert bounded.request_seconds(60.0) == 120.0
    assert bounded.request_seconds(60.0, 50 * 2**20) == 320.0
