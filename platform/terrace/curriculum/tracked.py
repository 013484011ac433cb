"""What a tracking server sees of a run: one run for the curriculum, one nested in it per stage, said while they run or afterwards.

The curriculum's run carries the loss of all stages one after another (steps counted on from stage to stage), evaluations as lines, and
which stage a step belongs to; a stage's run everything its rows have. A stage that is run again has lines of its own in both.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import read_json
from terrace.curriculum.state import RunState, StageState
from terrace.recipe.identity import recipe_hash
from terrace.recipe.schema import Recipe
from terrace.storage.mirror import place_of
from terrace.storage.run_layout import stage_directory
from terrace.track.points import evaluation_points
from terrace.track.series import RunSpec, Series
from terrace.track.tracking import Trackers

HasRun = Callable[[str], None]


class TrackedRun:
    """Calls to `tracking` about one run directory, as its journal (`state`) says it stands."""

    def __init__(self, tracking: Trackers, recipe: Recipe, run_dir: Path, state: RunState):
        self._tracking, self._recipe, self._run_dir, self._state = tracking, recipe, Path(run_dir), state

    def start(self, done: HasRun) -> None:
        """Open the curriculum's run."""
        parameters = self._recipe.model_dump(mode="json", exclude_none=True, exclude={"stages", "notes", "description"})
        tags = {
            "terrace.run_dir": place_of(self._run_dir),
            "mlflow.user": _user(),
            "mlflow.source.name": f"terrace run {self._recipe.name}",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": _commit(),
            "mlflow.note.content": self._recipe.description or "",
        }
        self._tracking.open_run(
            RunSpec(
                key=self._key(),
                name=self._recipe.name,
                parameters={**parameters, "recipe_hash": recipe_hash(self._recipe), "stages": [item.name for item in self._recipe.stages]},
                tags={name: value for name, value in tags.items() if value},
                run_id=self._state.tracking_run,
                started=self._state.started_at,
                datasets=self._datasets(),
                done=done,
            )
        )

    def start_stage(self, stage: StageState, done: HasRun) -> None:
        """Open the stage's run."""
        recipe_stage = self._recipe.stages[stage.index]
        name = f"{stage.index + 1:02d}-{stage.name}" + (f"-rerun-{stage.reruns}" if stage.reruns else "")
        self._tracking.open_run(
            RunSpec(
                key=self._key(stage),
                name=name,
                parameters=recipe_stage.model_dump(mode="json", exclude_none=True),
                tags={"terrace.stage": stage.name, "mlflow.user": _user(), "mlflow.source.name": f"terrace run {self._recipe.name}"},
                run_id=stage.tracking_run,
                parent=self._key(),
                started=stage.started_at,
                datasets=self._datasets(recipe_stage.mixture.weights),
                done=done,
            )
        )

    def rows(self, stage: StageState) -> None:
        """The stage's metrics.jsonl has new rows."""
        path, every = self._folder(stage) / "metrics.jsonl", self._recipe.tracking.log_every_steps
        self._tracking.log_rows(self._key(stage), Series(path, every))
        offset = self._steps_before(stage)
        self._tracking.log_rows(self._key(), Series(path, every, stage.index + 1, offset, _suffix(stage)))

    def end_stage(self, stage: StageState, status: str, seen_at: float | None = None) -> None:
        """The attempt is over (FINISHED, FAILED, SCHEDULED): the rest of its rows, its result, its state. `seen_at`: when somebody last
        worked on a run that is told of afterwards, at which the clock of what did not end stands still."""
        self.rows(stage)
        folder, tags = self._folder(stage), {}
        if stage.result:
            result = (read_json(folder / "result.json") or {}) | stage.result
            steps, before = int(result.get("steps", 0)), self._steps_before(stage)
            evaluation = result.get("evaluation") or {}
            for when, step, at in (("before", 0, stage.started_at), ("after", steps, stage.completed_at)):
                points = evaluation_points(evaluation.get(when))
                self._tracking.log_evaluation(self._key(stage), points, step, at or time.time())
                named = [(name + _suffix(stage), value) for name, value in points]
                self._tracking.log_evaluation(self._key(), named, before + step, at or time.time())
            self._tracking.log_artifacts(self._key(stage), [folder / "result.json", folder / "plan.json"])
            tags["terrace.final"] = place_of(folder / "final")
            self._tracking.log_model(self._key(stage), f"{self._recipe.name}-{folder.name}", tags["terrace.final"], steps)
        self._tracking.end_run(self._key(stage), status, tags, stage.completed_at or seen_at)

    def end(self, status: str, seen_at: float | None = None) -> None:
        """Leave the curriculum's run in this state, with recipe and journal as artifacts. `seen_at`: see `end_stage`."""
        self._tracking.log_artifacts(self._key(), [self._run_dir / "recipe.yaml", self._run_dir / "journal.jsonl"])
        self._tracking.end_run(self._key(), status, ended=self._state.ended_at or seen_at)

    def _folder(self, stage: StageState) -> Path:
        return stage_directory(self._run_dir, stage.index, stage.name)

    def _steps_before(self, stage: StageState) -> int:
        """Where the stage's steps begin among the curriculum's."""
        return sum(int((earlier.result or {}).get("steps", 0)) for earlier in self._state.stages[: stage.index])

    def _key(self, stage: StageState | None = None) -> str:
        """Names this run's (stage's) run on every server for ever: also after a crash, or when the directory is moved elsewhere."""
        names = [self._recipe.name, Path(place_of(self._run_dir)).name, self._state.started_at]
        names += [stage.name, stage.reruns] if stage else ["", 0]
        return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:32]

    def _datasets(self, names: Any = None) -> tuple[dict[str, str], ...]:
        """The sources as they were prepared (all, or the stage's): the digest names rows and index."""
        prepared = (read_json(self._run_dir / "data" / "prepared.json") or {}).get("sources", {})
        found = []
        for name, entry in prepared.items():
            source = self._recipe.data.sources.get(name)
            if source is None or (names is not None and name not in names):
                continue
            kind = "s3" if source.uri.startswith("s3://") else "local"
            where = json.dumps({"uri": source.uri})
            digest = hashlib.sha256(str(entry.get("folder")).encode()).hexdigest()[:16]
            found.append({"name": name, "digest": digest, "source_type": kind, "source": where})
        return tuple(found)


def _suffix(stage: StageState) -> str:
    return f"/rerun-{stage.reruns}" if stage.reruns else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's process without a name
        return ""


def _commit() -> str:
    """The commit of the folder the command is run in (recipes live there), if it is one's checkout."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip()
