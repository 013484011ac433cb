"""A work queue of names: each once, never two workers on one name, later when asked for later. In the manner of client-go's."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable


class WorkQueue:
    """`add` wakes a name now, `look_again` at a time; `take` blocks for the next one, `done` frees it for the next turn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        self._ready: dict[str, None] = {}  # in order of arrival
        self._later: list[tuple[float, str]] = []
        self._due: dict[str, float] = {}
        self._busy: set[str] = set()
        self._again: set[str] = set()
        self._closed = False

    def add(self, name: str) -> None:
        with self._condition:
            if name in self._busy:
                self._again.add(name)
            else:
                self._ready.setdefault(name)
                self._condition.notify()

    def look_again(self, name: str, seconds: float) -> None:
        """Wake the name after `seconds`. The newest look at it knows best when the next is due: an older appointment is void."""
        with self._condition:
            due = self._clock() + seconds
            if self._due.get(name) == due:
                return
            self._due[name] = due
            heapq.heappush(self._later, (due, name))
            self._condition.notify()

    def take(self, timeout: float = 1.0) -> str | None:
        """The next name, None after `timeout` seconds without one or when closed."""
        end = time.monotonic() + timeout
        with self._condition:
            while not self._closed:
                self._move_due()
                if self._ready:
                    name = next(iter(self._ready))
                    del self._ready[name]
                    self._busy.add(name)
                    return name
                wait = end - time.monotonic()
                if wait <= 0:
                    return None
                if self._later:
                    wait = min(wait, max(self._later[0][0] - self._clock(), 0.01))
                self._condition.wait(wait)
        return None

    def done(self, name: str) -> None:
        with self._condition:
            self._busy.discard(name)
            if name in self._again:
                self._again.discard(name)
                self._ready.setdefault(name)
                self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def __len__(self) -> int:
        with self._condition:
            return len(self._ready) + len(self._busy)

    def _move_due(self) -> None:
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            due, name = heapq.heappop(self._later)
            if self._due.get(name) == due:
                del self._due[name]
                if name in self._busy:
                    self._again.add(name)
                else:
                    self._ready.setdefault(name)
