"""How full an engine was: rows that decoded against rows that it had, and when. For the idle share and for the trace of an iteration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FINEST = 0.02  # seconds: steps of one trace entry at least, so that a long iteration keeps a short trace


@dataclass
class Usage:
    """`capacity`: the most rows that were decoded at once. Times are time.time(), which processes of a machine share."""

    capacity: int = 0
    live_steps: int = 0  # rows with a sequence, summed over steps
    steps: int = 0
    busy_seconds: float = 0.0  # of all rows together: half of them for a second is half a second
    spans: list[tuple[float, float, float]] = field(default_factory=list)  # (begin, end, mean rows with a sequence)
    prefills: list[tuple[float, float]] = field(default_factory=list)
    _span: list[float] = field(default_factory=list)  # begin, rows summed, steps

    def step(self, rows: int, live: int, began: float) -> None:
        """A decoding step of `rows` rows, `live` of which had a sequence, has run since `began`."""
        self.capacity = max(self.capacity, rows)
        self.live_steps, self.steps = self.live_steps + live, self.steps + 1
        now = time.time()
        self.busy_seconds += (now - began) * live / max(rows, 1)
        if not self._span:
            self._span = [began, 0.0, 0.0]
        self._span[1], self._span[2] = self._span[1] + live, self._span[2] + 1
        if now - self._span[0] >= FINEST:
            self.end(now)

    def end(self, now: float | None = None) -> None:
        """Nothing decodes until the next step."""
        if self._span:
            begin, total, count = self._span
            self.spans.append((begin, time.time() if now is None else now, total / max(count, 1)))
            self._span = []

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Prompts are computed inside."""
        begin = time.time()
        yield
        self.prefills.append((begin, time.time()))
        self.busy_seconds += self.prefills[-1][1] - begin

    @property
    def idle_share(self) -> float | None:
        """The share of (row, step) in which no sequence decoded; None before the first step."""
        return 1 - self.live_steps / (self.capacity * self.steps) if self.steps else None

    def taken(self) -> Usage:
        """What was noted since the last time, and begin anew."""
        self.end()
        taken = Usage(self.capacity, self.live_steps, self.steps, self.busy_seconds, self.spans, self.prefills)
        self.__init__()  # type: ignore[misc]
        return taken
