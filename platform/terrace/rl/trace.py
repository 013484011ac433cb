"""Who waited for what in an iteration: when the engine decoded (and how full), when rewards were computed, when the policy trained.

The last whole iteration lies in the stage's `iteration-trace.json`, which the report draws. Times are seconds since its begin.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from terrace.generation.usage import Usage
from terrace.storage.durable import json_bytes, write_durably

FILE = "iteration-trace.json"
MOST_SPANS = 400  # per lane: neighbours are joined beyond


class Trace:
    """Spans (begin, end, share) of lanes, of any thread; time.time()."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[str, list[tuple[float, float, float]]] = {}
        self.begin = time.time()

    def note(self, lane: str, begin: float, end: float | None = None, share: float = 1.0) -> None:
        """`share`: how busy it was."""
        with self._lock:
            self._lanes.setdefault(lane, []).append((begin, time.time() if end is None else end, share))

    def engine(self, usage: Usage | None, since: float) -> float | None:
        """Note what an engine did since a time, until now. Returns the share of its rows and seconds in which nothing decoded."""
        if usage is None or not usage.steps:
            return None
        for begin, end, live in usage.spans:
            self.note("decoding", begin, end, live / max(usage.capacity, 1))
        for begin, end in usage.prefills:
            self.note("prompts", begin, end)
        return 1 - min(1.0, usage.busy_seconds / max(time.time() - since, 1e-9))

    def write(self, stage_dir: Path, iteration: int, more: dict[str, Any]) -> None:
        """The trace so far is that of `iteration` (from 1), which ends now."""
        with self._lock:
            lanes = {lane: _short(spans, self.begin) for lane, spans in self._lanes.items()}
        said = {"iteration": iteration, "seconds": round(time.time() - self.begin, 4), "lanes": lanes, **more}
        write_durably(stage_dir / FILE, json_bytes(said))


def _short(spans: Iterable[tuple[float, float, float]], begin: float) -> list[list[float]]:
    """Spans in order, since `begin`; neighbours joined two by two while there are too many."""
    found = sorted([max(0.0, start - begin), end - begin, share] for start, end, share in spans if end > begin)
    while len(found) > MOST_SPANS:
        pairs = [found[place : place + 2] for place in range(0, len(found), 2)]
        found = [[pair[0][0], pair[-1][1], sum(one[2] for one in pair) / len(pair)] for pair in pairs]
    return [[round(value, 4) for value in span] for span in found]
