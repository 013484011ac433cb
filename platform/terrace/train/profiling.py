"""Traces of chosen steps (`profile.steps`), one file per rank for chrome://tracing or Perfetto, and what they tell.

A profiled step is several times slower than the others. From its trace comes the share of the step in which a
collective ran, which nothing else can tell: `communication_share` in metrics.jsonl, of rank 0. On CUDA,
`communication_exposed_share` is the part of it in which no other kernel ran.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from terrace.worker.context import WorkerContext

Span = tuple[float, float]  # microseconds from, to


class StepProfiler:
    """Profiles the steps it is told to, and does nothing in the others."""

    def __init__(self, steps: Sequence[int], folder: Path, context: WorkerContext) -> None:
        self._steps, self._folder, self._context = frozenset(steps), folder, context

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[dict[str, float]]:
        """Around step `number` (from 1); the map it gives is filled at its end, if the step is one of those."""
        values: dict[str, float] = {}
        if number not in self._steps:
            yield values
            return
        cuda = self._context.device.startswith("cuda")
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
        started = time.perf_counter()
        with torch.profiler.profile(activities=activities) as profile:
            yield values
            if cuda:
                torch.cuda.synchronize(self._context.device)
            seconds = time.perf_counter() - started
        self._folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._folder / f"step-{number:06d}-rank-{self._context.rank:05d}.json.gz"))
        values.update(communication(profile.events() or (), seconds, cuda))


def communication(events: Iterable[Any], seconds: float, cuda: bool) -> dict[str, float]:
    """Shares of a step of `seconds` from the profiler's events."""
    collectives: list[Span] = []
    kernels: list[Span] = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if not cuda and event.name.startswith("gloo:"):
            collectives.append(span)
        elif cuda and event.device_type == torch.autograd.DeviceType.CUDA:
            (collectives if "nccl" in event.name.lower() else kernels).append(span)
    whole = seconds * 1e6
    values = {"communication_share": covered(collectives) / whole}
    if cuda:
        values["communication_exposed_share"] = (covered([*collectives, *kernels]) - covered(kernels)) / whole
    return values


def covered(spans: Iterable[Span]) -> float:
    """Microseconds that lie in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
