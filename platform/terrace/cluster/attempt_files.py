"""The files of attempts: where a stage's files lie, and how a controller and workers on any machine speak through small ones.

The files of a stage lie at `stage_directory(...)`. A stop request and the newest attempt's number are small files there,
replaced atomically, which whoever sees the run directory can read; every rank leaves its outcome under `attempts/<NNN>/`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from terrace.errors import TerraceError


class Fenced(TerraceError):
    """A newer attempt of the same stage was started: this one must stop and write nothing more."""


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
