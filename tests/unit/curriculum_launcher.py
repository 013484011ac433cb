"""A launcher without Ray: attempts are counters in memory, or their remains on disk. For tests of the controller."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from terrace.cluster import attempt_files as files
from terrace.cluster.attempt import AttemptObservation, LaunchRequest
from terrace.cluster.attempt_files import write_atomic
from terrace.cluster.attempt_outcome import stage_result
from terrace.storage.run_layout import stage_directory


class Killed(BaseException):
    """The controller's process dies here: nothing after it runs, as with kill -9."""


@dataclass
class CountingLauncher:
    """Every look at an attempt moves it one step; `steps` steps are a stage. `outcomes` scripts failures by (stage, attempt).

    The weights of a stage are a text that grows by one word per step from the stage before, so that a lost or repeated step shows.
    """

    recipe: object
    steps: int = 3
    outcomes: dict[tuple[str, int], str] = field(default_factory=dict)
    hook: Callable[[str], None] = lambda what: None  # called at every point where a kill may strike
    name: str = "counting"
    running: dict[tuple[str, int], str] = field(default_factory=dict)
    launched: list[tuple[str, int]] = field(default_factory=list)

    def attach(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def launch(self, request: LaunchRequest) -> None:
        self.hook("before launch")
        files.claim_attempt(stage_directory(request.run_dir, request.stage_index, request.stage), request.attempt)
        self.launched.append((request.stage, request.attempt))
        self.running[request.stage, request.attempt] = "running"
        self.hook("after launch")

    def observe(self, stage_index: int, stage: str, attempt: int) -> AttemptObservation:
        folder = stage_directory(self.run_dir, stage_index, stage)
        if result := stage_result(folder):
            self.running.pop((stage, attempt), None)
            return AttemptObservation(stage, attempt, "succeeded", result=result)
        status = self.running.get((stage, attempt))
        if status is None:
            claimed = files.read_json(folder / "attempt.json")
            return AttemptObservation(stage, attempt, "interrupted" if claimed and claimed["attempt"] >= attempt else "absent")
        if files.stop_requested(folder, attempt):
            status = "preempted"
        status = self.outcomes.get((stage, attempt), status)
        if status in ("program", "infrastructure", "input"):
            del self.running[stage, attempt]
            return AttemptObservation(stage, attempt, "failed", failure=status, reason="Told", message=f"told to fail ({status})")
        if status == "preempted":
            del self.running[stage, attempt]
            return AttemptObservation(stage, attempt, "preempted")
        self._one_step(stage_index, stage, folder)
        return AttemptObservation(stage, attempt, "running", live=True)

    def _one_step(self, stage_index: int, stage: str, folder: Path) -> None:
        before = ""
        if stage_index:
            previous = self.recipe.stages[stage_index - 1].name
            before = (stage_directory(self.run_dir, stage_index - 1, previous) / "final" / "weights").read_text()
        metrics = folder / "metrics.jsonl"
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if done < self.steps:
            with open(metrics, "a") as file:
                file.write(json.dumps({"step": done + 1, "loss": 1.0, "tokens": 1, "samples": 1}) + "\n")
        else:
            write_atomic(folder / "final" / "weights", before + "".join(f" {stage}.{step}" for step in range(self.steps)))
            write_atomic(folder / "result.json", json.dumps({"steps": self.steps, "loss": 1.0, "evaluation": {"after": {"caption": 1.0}}}))
        self.hook("after a step")

    def live_attempts(self) -> list[tuple[str, int]]:
        return [key for key, status in self.running.items() if status == "running"]

    def stop(self, stage_index: int, stage: str, attempt: int, reason: str, force: bool) -> None:
        if force:
            self.running.pop((stage, attempt), None)
        else:
            files.request_stop(stage_directory(self.run_dir, stage_index, stage), attempt, reason)

    def close(self) -> None:
        self.hook("close")
