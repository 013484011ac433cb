"""Progress of long work on data, in words for a terminal."""

from __future__ import annotations

import sys
import time


class Lines:
    """Progress as one line every few seconds, on stderr."""

    def __init__(self, every_seconds: float = 3.0):
        self._every, self._last = every_seconds, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            print(f"{what}: {100 * done // max(1, total)} %", file=sys.stderr, flush=True)
