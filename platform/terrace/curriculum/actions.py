"""What the state machine is told and what it answers: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from terrace.cluster.attempt import AttemptObservation
from terrace.curriculum.state import StageState


@dataclass(frozen=True)
class Observation:
    """What the controller sees now. `attempts` holds at least the newest attempt of every stage in flight."""

    attempts: tuple[AttemptObservation, ...] = ()
    live: tuple[tuple[str, int], ...] = ()  # every (stage, attempt) of which something may still run
    interrupted: bool = False  # the controller itself was told to stop (SIGTERM): checkpoint and leave, the run goes on later

    def attempt(self, stage: StageState) -> AttemptObservation:
        for seen in self.attempts:
            if (seen.stage, seen.attempt) == (stage.name, stage.attempt):
                return seen
        return AttemptObservation(stage.name, stage.attempt, "absent")


@dataclass(frozen=True)
class Record:
    """Append this event to the journal (the writer adds time and sequence)."""

    event: dict[str, Any]


@dataclass(frozen=True)
class Prepare:
    """Ingest and index the data, train or copy the tokenizer. Idempotent."""


@dataclass(frozen=True)
class Clear:
    """Move what earlier runs of the stage wrote aside, under this rerun number. Idempotent."""

    stage_index: int
    stage: str
    rerun: int


@dataclass(frozen=True)
class Launch:
    """Start the attempt or adopt it."""

    stage_index: int
    stage: str
    attempt: int


@dataclass(frozen=True)
class Stop:
    """Ask the attempt to checkpoint and end, or (`force`) end it at once. Idempotent."""

    stage_index: int
    stage: str
    attempt: int
    reason: str
    force: bool = False


@dataclass(frozen=True)
class Wait:
    """Nothing to do before `until` (seconds since the epoch) or the next event."""

    until: float
    reason: str


@dataclass(frozen=True)
class Finish:
    """The controller's work is done: leave with this status."""

    phase: str
    exit_status: int
    message: str = field(default="")


Action = Record | Prepare | Clear | Launch | Stop | Wait | Finish
