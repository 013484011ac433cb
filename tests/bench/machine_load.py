"""Whether a machine is quiet enough for seconds to mean something: what others take of its cores, before and during a measurement."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

HIGHEST_LOAD_BEFORE = 0.7  # processes that wait for a core or run, over the last minute
HIGHEST_SHARE_OF_OTHERS = 0.05  # of the machine's cores
QUIET_SECONDS = 3.0  # watched before the measurement
LOOK_SECONDS = 0.5  # between two looks at the processes below this one
PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    before: float  # /proc/loadavg, of the last minute
    others_before: float  # share of all cores that other processes took just before
    others_during: float

    @property
    def quiet(self) -> bool:
        return self.before <= HIGHEST_LOAD_BEFORE and max(self.others_before, self.others_during) <= HIGHEST_SHARE_OF_OTHERS

    def __str__(self) -> str:
        return (
            f"load {self.before:.2f} before; other processes took {self.others_before:.1%} of the cores just before and "
            f"{self.others_during:.1%} during the measurement"
        )


class Watch:
    """Made before the measurement; `end` tells of it. What this process started counts as this one, and so do daemons whose parent has
    ended meanwhile (a Ray outlives the command that started it): they become children of this process."""

    def __init__(self) -> None:
        _adopt_orphans(True)
        self._before = load_of_last_minute()
        self._others_before = others_now()
        self._below: dict[tuple[int, int], float] = {}
        self._ended = threading.Event()
        self._look()
        self._first = self._seconds()
        self._thread = threading.Thread(target=self._follow, name="load", daemon=True)
        self._thread.start()

    def end(self) -> Load:
        self._ended.set()
        self._thread.join()
        self._look()
        _adopt_orphans(False)
        return Load(self._before, self._others_before, _share(self._first, self._seconds()))

    def _follow(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """A process that nobody waits for takes its seconds with it, so they are noted while it lives."""
        self._below.update(seconds_below(os.getpid()))

    def _seconds(self) -> tuple[float, float, float]:
        """As `_seconds`, with everything below this process. A child that was waited for is in both sums: the larger one is taken."""
        clock, busy, own = _seconds()
        times = os.times()
        waited = times.children_user + times.children_system
        return clock, busy, own - waited + max(waited, sum(self._below.values()))


def _adopt_orphans(wanted: bool) -> None:
    with contextlib.suppress(AttributeError):  # Linux alone has it; elsewhere orphans count as others
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def seconds_below(root: int) -> dict[tuple[int, int], float]:
    """Processor seconds of every living process that descends from `root`, by its number and when it started."""
    found: dict[int, tuple[int, int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # behind the name, which may hold anything
            found[int(path.parent.name)] = int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / TICKS
    below: dict[tuple[int, int], float] = {}
    for process, (parent, started, seconds) in found.items():
        seen = {process}
        while parent in found and parent != root and parent not in seen:
            seen.add(parent)
            parent = found[parent][0]
        if parent == root and process != root:
            below[process, started] = seconds
    return below


def load_of_last_minute() -> float:
    return float(Path("/proc/loadavg").read_text().split()[0])


def others_now() -> float:
    """Share of the cores that other processes take, watched for a moment in which this one does nothing."""
    first = _seconds()
    time.sleep(QUIET_SECONDS)
    return _share(first, _seconds())


def _seconds() -> tuple[float, float, float]:
    """(clock, processor seconds of the whole machine, those of this process and its ended children)."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    ticks = dict(zip(names, map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])))
    busy = sum(value for name, value in ticks.items() if name not in ("idle", "iowait")) / TICKS
    own = os.times()
    return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system


def _share(first: tuple[float, float, float], last: tuple[float, float, float]) -> float:
    clock, busy, own = (after - before for before, after in zip(first, last))
    return max(0.0, busy - own) / (clock * (os.cpu_count() or 1))
