"""What a launcher is asked to start and what it saw of it: plain values shared by every launcher and the state machine.

An *attempt* is one try at one stage, numbered from 1 over the whole life of the run directory, so that a number is
never used twice and a newer number fences an older one. The files of a stage lie at `stage_directory(...)`; a stop
request and the newest attempt's number are small files there, which workers on any machine that sees the run
directory can read.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from terrace.errors import TerraceError
from terrace.track.follow import last_row

AttemptStatus = Literal["absent", "starting", "running", "succeeded", "failed", "preempted", "interrupted"]
FailureKind = Literal["program", "infrastructure", "input"]


class Fenced(TerraceError):
    """A newer attempt of the same stage was started: this one must stop and write nothing more."""


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


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file that its writer replaces atomically; None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def request_stop(stage_dir: Path, attempt: int, reason: str) -> None:
    """Leave the request to checkpoint and stop where the attempt's workers look for it."""
    write_atomic(stage_dir / f"stop-{attempt}.json", json.dumps({"reason": reason, "time": time.time()}))


def claim_attempt(stage_dir: Path, attempt: int) -> None:
    """Make `attempt` the only one that may write in the stage's directory."""
    current = read_json(stage_dir / "attempt.json")
    if current and current["attempt"] > attempt:
        raise Fenced(f"attempt {attempt} of {stage_dir.name} was overtaken by attempt {current['attempt']}; nothing was started")
    write_atomic(stage_dir / "attempt.json", json.dumps({"attempt": attempt}))


def check_fence(stage_dir: Path, attempt: int) -> None:
    """Raises Fenced when a newer attempt owns the stage."""
    current = read_json(stage_dir / "attempt.json")
    if current and current["attempt"] > attempt:
        raise Fenced(f"attempt {attempt} of {stage_dir.name} was overtaken by attempt {current['attempt']}")


def stop_requested(stage_dir: Path, attempt: int) -> str | None:
    """The reason to stop, None to go on. Raises Fenced when a newer attempt owns the stage."""
    check_fence(stage_dir, attempt)
    request = read_json(stage_dir / f"stop-{attempt}.json")
    return request["reason"] if request else None


def outcome_path(stage_dir: Path, attempt: int, rank: int) -> Path:
    return stage_dir / "attempts" / f"{attempt:03d}" / f"rank-{rank:04d}.json"


def write_outcome(stage_dir: Path, attempt: int, rank: int, outcome: dict[str, Any]) -> None:
    """How this rank's attempt ended: `status` succeeded, preempted or failed, with the error in words."""
    write_atomic(outcome_path(stage_dir, attempt, rank), json.dumps(outcome))


def read_outcomes(stage_dir: Path, attempt: int) -> list[dict[str, Any]]:
    folder = outcome_path(stage_dir, attempt, 0).parent
    return [outcome for path in sorted(folder.glob("rank-*.json")) if (outcome := read_json(path))]


def checkpoint_steps(stage_dir: Path) -> list[int]:
    """Steps of a stage's checkpoints, lowest first: folders on this disk, or those that the fence of a run on S3 lists as complete."""
    fence = read_json(stage_dir / "checkpoints" / "attempt.json") or {}
    if "complete" in fence:
        return sorted(int(step) for step in fence["complete"])
    return sorted(int(name) for path in (stage_dir / "checkpoints").glob("step-*") if (name := path.name[5:]).isdigit())


def newest_checkpoint_step(stage_dir: Path) -> int | None:
    """The step of a stage's newest checkpoint; the trainer itself decides whether it can be used."""
    return max(checkpoint_steps(stage_dir), default=None)


def stage_result(stage_dir: Path) -> dict[str, Any] | None:
    """The result of a complete stage, with the numbers of its last step as `train`; None while it is not complete."""
    result = read_json(stage_dir / "result.json")
    if result is None:
        return None
    row = last_row(stage_dir / "metrics.jsonl") or {}
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    if row.get("step_seconds") and "data_wait_seconds" in row:
        numbers["data_wait_share"] = row["data_wait_seconds"] / row["step_seconds"]
    return {**result, "train": numbers}


def progress_time(stage_dir: Path) -> float | None:
    """The newest write by the trainer that only progress causes: a step, a report, a checkpoint."""
    times = []
    for name in ("metrics.jsonl", "progress.json", "checkpoints"):
        try:
            times.append((stage_dir / name).stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times, default=None)


def outcome(stage_dir: Path, stage: str, attempt: int) -> AttemptObservation | None:
    """How an attempt without a result ended, from what its ranks wrote; None where none of them wrote anything."""
    hang = read_json(stage_dir / "hang" / f"attempt-{attempt:03d}" / "summary.json")  # left by terrace.train.watchdog
    if hang is not None:  # ranks that hang end their process without an outcome
        return AttemptObservation(stage, attempt, "failed", failure="infrastructure", reason="Hang", message=hang["message"])
    ended = read_outcomes(stage_dir, attempt)
    failed = [found for found in ended if found["status"] == "failed"]
    # A rank that failed by itself explains the others, which fail because a collective lost a member.
    failed.sort(key=lambda found: (found.get("consequence", False), found["time"]))
    if failed:
        first = failed[0]
        kind: FailureKind = "input" if first["exit_status"] == 2 else "program"
        message = f"rank {first['rank']}: {first['message']}"
        return AttemptObservation(stage, attempt, "failed", failure=kind, reason=first["error"], message=message)
    if any(found["status"] == "preempted" for found in ended):
        return AttemptObservation(stage, attempt, "preempted", message="a checkpoint was saved")
    return None
