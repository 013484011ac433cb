"""What the files of a stage say of it: its checkpoints, its result, its newest progress, and how an attempt ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terrace.cluster.attempt import AttemptObservation, FailureKind
from terrace.cluster.attempt_files import read_json, read_outcomes
from terrace.cluster.seen import unchanged_since
from terrace.track.follow import last_row


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
    """When this process last saw a write by the trainer that only progress causes: a step, a report, a checkpoint."""
    times = []
    for name in ("metrics.jsonl", "progress.json", "checkpoints"):
        try:
            times.append(unchanged_since(stage_dir / name))
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
        message = f"{first['message']} (rank {first['rank']})"
        return AttemptObservation(stage, attempt, "failed", failure=kind, reason=first["error"], message=message)
    if any(found["status"] == "preempted" for found in ended):
        return AttemptObservation(stage, attempt, "preempted", message="a checkpoint was saved")
    return None


def unknown(stage_dir: Path, stage: str, attempt: int) -> AttemptObservation:
    """An attempt without an outcome that this controller did not start: one before it did, or nobody."""
    claimed = read_json(stage_dir / "attempt.json")
    started = claimed is not None and claimed["attempt"] >= attempt
    return AttemptObservation(stage, attempt, "interrupted" if started else "absent")
