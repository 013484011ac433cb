"""What a launcher is asked to start and what it saw of it: plain values shared by every launcher and the state machine.

An *attempt* is one try at one stage, numbered from 1 over the whole life of the run directory, so that a number is
never used twice and a newer number fences an older one. The files that attempts leave and read are in
`attempt_files`, how an attempt that has ended is judged by them in `attempt_outcome`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

AttemptStatus = Literal["absent", "starting", "running", "succeeded", "failed", "preempted", "interrupted"]
FailureKind = Literal["program", "infrastructure", "input"]


@dataclass(frozen=True)
class AttemptObservation:
    """What a launcher sees of one attempt.

    `absent` is an attempt the launcher knows nothing of (never started, or gone without a trace). `preempted` ended
    because it was told to and saved a checkpoint. `interrupted` died together with its controller, so nobody can say
    why. `live` says that something of it may still run and write (a process, a job, a pod): no other attempt may
    start before it is False.
    """

    stage: str
    attempt: int
    status: AttemptStatus
    live: bool = False
    failure: FailureKind | None = None
    reason: str = ""
    message: str = ""
    result: dict[str, Any] | None = None
    step: int | None = None
    progress_at: float | None = None  # seconds since the epoch of the newest sign of progress


@dataclass(frozen=True)
class LaunchRequest:
    """One stage attempt to start."""

    stage_index: int
    stage: str
    attempt: int
    run_dir: Path


class Launcher(Protocol):
    """Starts attempts and says what became of them. None of the calls blocks for long."""

    name: str

    def attach(self, run_dir: Path) -> None:
        """The run directory whose attempts this launcher looks after; called once, first."""

    def launch(self, request: LaunchRequest) -> None:
        """Start the attempt, or adopt it if it already runs (the same request may come twice after a crash)."""

    def observe(self, stage_index: int, stage: str, attempt: int) -> AttemptObservation: ...

    def live_attempts(self) -> list[tuple[str, int]]:
        """Every (stage, attempt) of this run of which something may still run."""

    def stop(self, stage_index: int, stage: str, attempt: int, reason: str, force: bool) -> None:
        """Ask for a checkpoint and an end (`force` False), or end it at once."""

    def close(self) -> None: ...
