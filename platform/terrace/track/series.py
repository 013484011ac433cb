"""What a tracker is told of a run, whichever tracker it is: which run it is, and which of a metrics.jsonl's rows it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.track.points import MARKER, STAGE_MARKER, Point, curriculum_points, stage_points

Dated = tuple[str, float, float | None, int]  # name, value, when (seconds since the epoch), step


class StoreWaitsError(Exception):
    """The store is there and takes nothing until a person has changed something in it: as good as away, and the message says what."""


@dataclass(frozen=True)
class RunSpec:
    """A run as it should be on the server. `key` names it for ever; `run_id` is the one it had, if any; times in seconds (epoch)."""

    key: str
    name: str
    parameters: dict[str, Any]
    tags: dict[str, str]
    run_id: str | None = None
    parent: str | None = None  # the parent's key
    started: float | None = None
    datasets: tuple[dict[str, str], ...] = ()  # name, digest, source, source_type
    done: Callable[[str], None] = lambda run_id: None


@dataclass(frozen=True)
class Series:
    """The rows of one metrics.jsonl as a run shows them: a stage's own, or (`stage` from 1) its part of the curriculum's.

    `every`: which steps; `offset`: steps of the stages before; `suffix` tells a rerun's lines from those before it.
    """

    path: Path
    every: int = 1
    stage: int | None = None
    offset: int = 0
    suffix: str = ""

    @property
    def marker(self) -> str:
        return MARKER if self.stage is None else STAGE_MARKER + self.suffix

    def points(self, row: dict[str, Any]) -> list[Point]:
        return stage_points(row) if self.stage is None else curriculum_points(row, self.stage, self.suffix)


def batches(rows: Iterable[dict[str, Any]], series: Series, position: int, most: int) -> Iterator[tuple[list[Dated], int]]:
    """(points, their last step) of the rows after `position`, each a few whole steps and about `most` points."""
    batch: list[Dated] = []
    step = position
    for row in rows:
        number = int(row["step"])
        if series.offset + number <= position or not (number == 1 or number % series.every == 0):
            continue
        points = [(name, value, row.get("time"), series.offset + number) for name, value in series.points(row)]
        if batch and len(batch) + len(points) > most:
            yield batch, step
            batch = []
        batch += points
        step = series.offset + number
    if batch:
        yield batch, step
