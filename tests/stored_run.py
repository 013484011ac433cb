"""A bucket, and machines that share nothing but it: each has a cache folder and a host name of its own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3_server

from terrace.storage import s3 as storage

BUCKET = "terrace-runs"


@dataclass
class Machines:
    """`with machines.on("a"): ...` runs the block as that machine would."""

    folder: Path
    server: s3_server.S3Server

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.folder / name))
            patch.setattr(socket, "gethostname", lambda: name)
            yield

    def environment(self, name: str) -> dict[str, str]:
        """The variables of a process on that machine."""
        return {"XDG_CACHE_HOME": str(self.folder / name), "AWS_ENDPOINT_URL": self.server.url, **s3_server.ACCESS}


@contextlib.contextmanager
def machines_and_bucket(folder: Path) -> Iterator[Machines]:
    """An S3 server with one empty bucket, reached by this process's environment until the block ends."""
    with pytest.MonkeyPatch.context() as patch, s3_server.serve_s3() as server:
        for name, value in {**s3_server.ACCESS, "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        storage._filesystem.cache_clear()
        filesystem = storage.s3()
        if filesystem.exists(BUCKET):  # moto keeps its buckets as long as the process lives
            filesystem.rm(BUCKET, recursive=True)
        filesystem.mkdir(BUCKET)
        yield Machines(folder, server)
        storage._filesystem.cache_clear()
