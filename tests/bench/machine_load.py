"""Whether a machine is quiet enough for seconds to mean something: what others take of its cores, before and during a measurement."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

HIGHEST_LOAD_BEFORE = 0.7  # processes that wait for a core or run, over the last minute
HIGHEST_SHARE_OF_OTHERS = 0.05  # of the machine's cores
QUIET_SECONDS = 3.0  # watched before the measurement


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
    """Made before the measurement; `end` tells of it. Processes that were started and waited for count as this one."""

    def __init__(self) -> None:
        self._before = load_of_last_minute()
        self._others_before = others_now()
        self._first = _seconds()

    def end(self) -> Load:
        return Load(self._before, self._others_before, _share(self._first, _seconds()))


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
    busy = sum(value for name, value in ticks.items() if name not in ("idle", "iowait")) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system


def _share(first: tuple[float, float, float], last: tuple[float, float, float]) -> float:
    clock, busy, own = (after - before for before, after in zip(first, last))
    return max(0.0, busy - own) / (clock * (os.cpu_count() or 1))
