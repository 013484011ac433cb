"""Shows and tracks a stage while it runs: rows of its metrics.jsonl go to the display and to MLflow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import read_json
from terrace.cluster.attempt_outcome import newest_checkpoint_step
from terrace.curriculum.state import RunState, StageState
from terrace.curriculum.tracked import TrackedRun
from terrace.recipe.schema import Recipe, Stage
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import MetricsFollower
from terrace.track.progress import Display
from terrace.track.tracking import Trackers, open_tracking

TRACK_SECONDS = 2.0  # between two sendings: a transaction costs a tracking server as much for one step as for twenty


class Watch:
    """One per controller. `record` appends to the journal; it is only called from `poll` and the stage methods."""

    def __init__(self, recipe: Recipe, run_dir: Path, state: RunState, display: Display, record: Callable[[dict[str, Any]], None]):
        self._recipe, self._run_dir, self._state = recipe, run_dir, state
        self._display, self._record = display, record
        self._tracking: Trackers | None = None
        self._tracked: TrackedRun | None = None
        self._new_runs: list[dict[str, Any]] = []  # tracking_started events that the tracking thread wants in the journal
        self._follower: MetricsFollower | None = None
        self._stage: StageState | None = None
        self._checkpoint: int | None = None
        self._attempt = 0
        self._untracked = False  # rows have come since the last sending
        self._track_at = 0.0  # of the monotonic clock: when the next one may be

    def start(self) -> None:
        """Open tracking and continue or create the curriculum's run."""
        tracking = self._recipe.tracking
        self._tracking = open_tracking(
            self._run_dir, tracking.uri, tracking.experiment, self._display.message, tracking.also, tracking.system_metrics
        )
        self._tracked = TrackedRun(self._tracking, self._recipe, self._run_dir, self._state)
        self._tracked.start(lambda run_id: self._new_runs.append({"event": "tracking_started", "run_id": run_id}))
        self._tracking.flush()
        self._record_runs()

    def follows(self, stage: StageState) -> bool:
        return self._stage is not None and (self._stage.name, self._attempt) == (stage.name, stage.attempt)

    def begin_stage(self, stage: StageState) -> None:
        """An attempt of the stage starts or is adopted."""
        recipe_stage = self._recipe.stages[stage.index]
        self._stage, self._attempt = stage, stage.attempt
        self._checkpoint = stage.checkpoint_step
        folder = stage_directory(self._run_dir, stage.index, stage.name)
        self._follower = MetricsFollower(folder / "metrics.jsonl")
        self._display.stage(stage.index + 1, len(self._recipe.stages), stage.name, planned_steps(recipe_stage))
        if self._tracked:
            self._tracked.start_stage(
                stage,
                lambda run_id: self._new_runs.append({"event": "stage_tracking_started", "stage": stage.name, "run_id": run_id}),
            )

    def poll(self) -> None:
        """Take what is new."""
        self._record_runs()
        if self._stage is None or self._follower is None:
            return
        rows = list(self._follower.rows())
        if rows and (plan := read_json(self._follower.path.with_name("plan.json"))):
            self._display.total(plan["total_steps"])
        if rows:  # the newest: what an earlier attempt wrote is neither shown again nor taken for this one's speed
            self._display.step(rows[-1])
        self._untracked = self._untracked or bool(rows)
        if self._untracked and self._tracked and time.monotonic() >= self._track_at:
            self._tracked.rows(self._stage)
            self._untracked, self._track_at = False, time.monotonic() + TRACK_SECONDS
        step = newest_checkpoint_step(stage_directory(self._run_dir, self._stage.index, self._stage.name))
        if step is not None and step != self._checkpoint:
            self._checkpoint = step
            self._record({"event": "checkpoint_saved", "stage": self._stage.name, "attempt": self._stage.attempt, "step": step})

    def end_stage(self, stage: StageState, status: str) -> None:
        """The attempt is over: the rest of its rows, its result, its state in MLflow (FINISHED, FAILED, SCHEDULED)."""
        if not self.follows(stage):
            return
        self.poll()
        if self._tracked and self._tracking:
            self._tracked.end_stage(stage, status)
            if stage.tracking_run is None:  # a stage of a few steps can be over before the server has made its run
                self._tracking.flush()
                self._record_runs()
        self._stage = self._follower = None

    def close(self, status: str) -> None:
        """Leave the curriculum's run in this state, with recipe and journal as artifacts."""
        if self._tracking is None or self._tracked is None:
            return
        self._tracked.end(status)
        self._tracking.close()

    def _record_runs(self) -> None:
        while self._new_runs:
            event = self._new_runs.pop(0)
            stage = self._state.stage(event.get("stage"))
            known = stage.tracking_run if stage else self._state.tracking_run
            if known != event["run_id"]:
                self._record(event)


def planned_steps(stage: Stage) -> int | None:
    """Steps of the stage where its budget alone says so."""
    if stage.budget.steps:
        return stage.budget.steps
    if stage.budget.tokens:
        return math.ceil(stage.budget.tokens / (stage.batch.packs * stage.sequence_length))
    return None
