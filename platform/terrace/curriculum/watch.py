"""Shows and tracks a stage while it runs: rows of its metrics.jsonl go to the display and to MLflow."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import read_json
from terrace.cluster.attempt_outcome import newest_checkpoint_step
from terrace.curriculum.state import RunState, StageState
from terrace.recipe.schema import Recipe, Stage
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import MetricsFollower
from terrace.track.mlflow_store import Tracking, open_tracking
from terrace.track.progress import Display


class Watch:
    """One per controller. `record` appends to the journal; it is only called from `poll` and the stage methods."""

    def __init__(self, recipe: Recipe, run_dir: Path, state: RunState, display: Display, record: Callable[[dict[str, Any]], None]):
        self._recipe, self._run_dir, self._state = recipe, run_dir, state
        self._display, self._record = display, record
        self._tracking: Tracking | None = None
        self._new_runs: list[dict[str, Any]] = []  # tracking_started events that the tracking thread wants in the journal
        self._follower: MetricsFollower | None = None
        self._stage: StageState | None = None
        self._unlogged: list[dict[str, Any]] = []
        self._checkpoint: int | None = None
        self._attempt = 0
        self._asked_for_run = False

    def start(self, recipe_parameters: dict[str, Any]) -> None:
        """Open tracking and continue or create the curriculum's run."""
        tracking = self._recipe.tracking
        self._tracking = open_tracking(self._run_dir, tracking.uri, tracking.experiment, self._display.message)
        self._tracking.start_run(
            self._recipe.name,
            self._state.tracking_run,
            None,
            recipe_parameters,
            {"terrace.run_dir": str(self._run_dir), "terrace.key": self._key("", 0)},
            lambda run_id: self._new_runs.append({"event": "tracking_started", "run_id": run_id}),
        )
        self._tracking.flush()
        self._record_runs()

    def follows(self, stage: StageState) -> bool:
        return self._stage is not None and (self._stage.name, self._attempt) == (stage.name, stage.attempt)

    def begin_stage(self, stage: StageState) -> None:
        """An attempt of the stage starts or is adopted."""
        recipe_stage = self._recipe.stages[stage.index]
        self._stage, self._attempt, self._unlogged = stage, stage.attempt, []
        self._checkpoint = stage.checkpoint_step
        folder = stage_directory(self._run_dir, stage.index, stage.name)
        self._follower = MetricsFollower(folder / "metrics.jsonl")
        self._display.stage(stage.index + 1, len(self._recipe.stages), stage.name, planned_steps(recipe_stage))
        self._asked_for_run = False
        self._start_stage_run()

    def poll(self) -> None:
        """Take what is new."""
        self._record_runs()
        if self._stage is None or self._follower is None:
            return
        self._start_stage_run()
        rows = list(self._follower.rows())
        if rows and (plan := read_json(self._follower.path.with_name("plan.json"))):
            self._display.total(plan["total_steps"])
        for row in rows:
            self._display.step(row)
        every = self._recipe.tracking.log_every_steps
        self._unlogged += [row for row in rows if every == 1 or row["step"] % every == 0 or row["step"] == 1]
        if self._tracking and self._stage.tracking_run and self._unlogged:
            self._tracking.log_steps(self._stage.tracking_run, self._unlogged)
            self._unlogged = []
        step = newest_checkpoint_step(stage_directory(self._run_dir, self._stage.index, self._stage.name))
        if step is not None and step != self._checkpoint:
            self._checkpoint = step
            self._record({"event": "checkpoint_saved", "stage": self._stage.name, "attempt": self._stage.attempt, "step": step})

    def end_stage(self, stage: StageState, status: str) -> None:
        """The attempt is over: the rest of its rows, its result, its state in MLflow (FINISHED, FAILED, SCHEDULED)."""
        if not self.follows(stage):
            return
        self._wait_for_run(stage)
        self.poll()
        if self._tracking and stage.tracking_run:
            if stage.result:
                self._tracking.log_result(stage.tracking_run, stage.result, int(stage.result.get("steps", 0)))
            self._tracking.end_run(stage.tracking_run, status)
        self._stage = self._follower = None

    def close(self, status: str) -> None:
        """Leave the curriculum's run in this state, with recipe and journal as artifacts."""
        if self._tracking is None:
            return
        if run := self._state.tracking_run:
            self._tracking.log_artifacts(run, [self._run_dir / "recipe.yaml", self._run_dir / "journal.jsonl"])
            self._tracking.end_run(run, status)
        self._tracking.close()

    def _start_stage_run(self) -> None:
        """Ask MLflow for the stage's run, once the curriculum's own is known (a slow server may answer late)."""
        stage = self._stage
        if self._asked_for_run or stage is None or self._tracking is None or self._state.tracking_run is None:
            return
        self._asked_for_run = True
        recipe_stage = self._recipe.stages[stage.index]
        name = f"{stage.index + 1:02d}-{stage.name}" + (f"-rerun-{stage.reruns}" if stage.reruns else "")
        self._tracking.start_run(
            name,
            stage.tracking_run,
            self._state.tracking_run,
            recipe_stage.model_dump(mode="json", exclude_none=True),
            {"terrace.stage": stage.name, "terrace.key": self._key(stage.name, stage.reruns)},
            lambda run_id: self._new_runs.append({"event": "stage_tracking_started", "stage": stage.name, "run_id": run_id}),
        )

    def _key(self, stage: str, rerun: int) -> str:
        """Names this run's (stage's) MLflow run for ever: the same after a crash, another for a directory that was made anew."""
        text = f"{self._run_dir}\n{self._state.started_at}\n{stage}\n{rerun}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _wait_for_run(self, stage: StageState) -> None:
        """A stage of a few steps can be over before MLflow has made its run."""
        if self._tracking and self._stage is stage and stage.tracking_run is None:
            self._tracking.flush()
            self._record_runs()

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
