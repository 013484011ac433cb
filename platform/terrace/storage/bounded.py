"""An S3 file system none of whose requests can wait for ever.

The HTTP client counts silence, and only from the moment when it has sent a request whole: one whose body nobody takes, or whose
`100 Continue` never comes because the store died in between, waits until the process ends, and a body that drips is never silent. Here
every request has a limit from its first byte to its answer, and every answer's body another, whoever asks: parts of a large upload,
ranges, listings, conditional writes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import s3fs
from fsspec.asyn import sync_wrapper

SLOWEST_BYTES_PER_SECOND = 256 * 1024  # of one of several requests that share a link; what is slower is tried again
WORKING = frozenset({"complete_multipart_upload", "copy_object", "upload_part_copy"})  # the store moves gigabytes before it answers
WORKING_LIMITS = 10  # limits of silence that such a request may take; S3 itself speaks of minutes


def request_seconds(timeout_seconds: float, size: int = 0) -> float:
    """When a request that carries `size` bytes one way or the other is given up: twice the limit of silence, and time for the bytes."""
    return 2 * timeout_seconds + size / SLOWEST_BYTES_PER_SECOND


class BoundedS3(s3fs.S3FileSystem):
    """`timeout_seconds`: how long the client waits for a silent peer. What takes longer in all raises TimeoutError."""

    def __init__(self, *args: Any, timeout_seconds: float = 60.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.timeout_seconds = timeout_seconds

    async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
        size = len(body) if isinstance(body := arguments.get("Body"), (bytes, bytearray, memoryview)) else 0
        limit = WORKING_LIMITS * self.timeout_seconds if method in WORKING else request_seconds(self.timeout_seconds, size)
        answer = await asyncio.wait_for(super()._call_s3(method, *options, **arguments), limit)
        if isinstance(answer, dict) and "Body" in answer:
            answer["Body"] = _Body(answer["Body"], request_seconds(self.timeout_seconds, int(answer.get("ContentLength") or 0)))
        return answer

    call_s3 = sync_wrapper(_call_s3)  # the base class's own would go round the limit


class _Body:
    """What an answer brings, readable until its time is over."""

    def __init__(self, body: Any, seconds: float):
        self._body, self._ends = body, time.monotonic() + seconds

    async def read(self, *size: int) -> bytes:
        return await asyncio.wait_for(self._body.read(*size), self._ends - time.monotonic())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)
