"""MLflow, the only file that imports it. One parent run per curriculum, a nested run per stage that a resume continues.

Everything happens in one thread of its own, fed by a queue: a slow or dead tracking server never holds up training.
Steps are logged in order, in batches that are each one transaction and end at a step's border; on a resume the newest
step in the store says where to go on. So no point is written twice and none is lost, and a run that is recomputed
from its checkpoint (same losses) adds only what was not there. Nothing is sent anywhere but to the tracking URI;
MLflow's own telemetry is switched off.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger(__name__)
MARKER = "loss"  # in every step's points, so its newest step is the store's position
BATCH_POINTS = 900  # MLflow takes at most 1,000 metrics in one call


class Tracking:
    """The curriculum's view of MLflow. Calls return at once; a new run's id comes through a callback.

    `run_id` of an earlier process continues that run. A failure is reported once through `warn` and drops tracking,
    never the run: metrics.jsonl keeps every point, and the next resume logs what is missing.
    """

    def __init__(self, uri: str, experiment: str, artifact_dir: Path | None, warn: Callable[[str], None]):
        self._uri, self._experiment, self._artifact_dir = uri, experiment, artifact_dir
        self._warn = warn
        self._queue: queue.Queue[Callable[[], None] | threading.Event | None] = queue.Queue()
        self._client: Any = None
        self._experiment_id = ""
        self._broken = False
        self._logged: dict[str, int] = {}  # newest step in the store, per run
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def start_run(
        self,
        name: str,
        run_id: str | None,
        parent: str | None,
        parameters: dict[str, Any],
        tags: dict[str, str],
        done: Callable[[str], None],
    ) -> None:
        """Create a run, or continue `run_id` or the one tagged with this `terrace.key`; `done(run_id)` comes from the tracking thread."""

        def work() -> None:
            if run_id is not None:
                self._client.update_run(run_id, status="RUNNING")
                done(run_id)
                return
            # A process killed between making the run and writing its id down left one behind: its key finds it.
            if key := tags.get("terrace.key"):
                found = self._client.search_runs([self._experiment_id], f"tags.`terrace.key` = '{key}'", max_results=1)
                if found:
                    self._client.update_run(found[0].info.run_id, status="RUNNING")
                    done(found[0].info.run_id)
                    return
            all_tags = {"mlflow.runName": name, **tags, **({"mlflow.parentRunId": parent} if parent else {})}
            run = self._client.create_run(self._experiment_id, tags=all_tags, run_name=name)
            self._log_parameters(run.info.run_id, parameters)
            done(run.info.run_id)

        self._queue.put(work)

    def log_steps(self, run_id: str, rows: list[dict[str, Any]]) -> None:
        """Rows of metrics.jsonl, in order. Steps that the store has already are left out."""
        self._queue.put(lambda: self._log_steps(run_id, rows))

    def log_result(self, run_id: str, result: dict[str, Any], step: int) -> None:
        """A stage's result: every number in it becomes a metric `result/...`."""
        points = [(f"result/{key}", value) for key, value in _numbers(result)]
        self._queue.put(lambda: self._log_points(run_id, points, step, int(time.time() * 1000)))

    def log_artifacts(self, run_id: str, paths: list[Path]) -> None:
        def work() -> None:
            for path in paths:
                if path.is_file():
                    self._client.log_artifact(run_id, str(path))

        self._queue.put(work)

    def end_run(self, run_id: str, status: str) -> None:
        """`status` is MLflow's: FINISHED, FAILED, KILLED, or SCHEDULED for a run that will go on."""
        self._queue.put(lambda: self._client.set_terminated(run_id, status=status))

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Wait until everything so far is in the store; False if that took too long or tracking failed."""
        reached = threading.Event()
        self._queue.put(reached)
        return reached.wait(timeout_seconds) and not self._broken

    def close(self, timeout_seconds: float = 30.0) -> None:
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    # ------------------------------------------------------------ in the tracking thread

    def _work(self) -> None:
        try:
            self._connect()
        except Exception as error:
            self._fail(error)
        while (work := self._queue.get()) is not None:
            if isinstance(work, threading.Event):
                work.set()
            elif not self._broken:
                try:
                    work()
                except Exception as error:
                    self._fail(error)

    def _fail(self, error: Exception) -> None:
        # Any error of the tracking library or server must leave training alone; it is named, and tracking stops for
        # this process.
        self._broken = True
        LOGGER.debug("tracking failed", exc_info=error)
        self._warn(
            f"tracking to {self._uri} stopped: {type(error).__name__}: {str(error).partition(chr(10))[0]}. "
            "The run goes on; metrics.jsonl keeps every step, and the next start logs what is missing."
        )

    def _connect(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient(self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        if found:
            self._experiment_id = found.experiment_id
        else:
            location = self._artifact_dir.absolute().as_uri() if self._artifact_dir else None
            self._experiment_id = self._client.create_experiment(self._experiment, artifact_location=location)

    def _log_parameters(self, run_id: str, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:500]) for key, value in flatten(parameters)]
        for start in range(0, len(flat), 100):
            self._client.log_batch(run_id, params=flat[start : start + 100])

    def _log_steps(self, run_id: str, rows: list[dict[str, Any]]) -> None:
        if run_id not in self._logged:
            history = self._client.get_metric_history(run_id, MARKER)
            self._logged[run_id] = max((point.step for point in history), default=0)
        batch: list[Any] = []
        for row in rows:
            if row["step"] <= self._logged[run_id]:
                continue
            points = _points(row)
            if batch and len(batch) + len(points) > BATCH_POINTS:
                self._client.log_batch(run_id, metrics=batch)
                batch = []
            batch += points
            self._logged[run_id] = row["step"]
        if batch:
            self._client.log_batch(run_id, metrics=batch)

    def _log_points(self, run_id: str, points: list[tuple[str, float]], step: int, milliseconds: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, milliseconds, step) for key, value in points]
        for start in range(0, len(metrics), BATCH_POINTS):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH_POINTS])


def open_tracking(run_dir: Path, uri: str | None, experiment: str, warn: Callable[[str], None]) -> Tracking:
    """Tracking at `uri`, or in `RUN/mlflow.db` with artifacts under `RUN/mlartifacts`."""
    if uri:
        return Tracking(uri, experiment, None, warn)
    return Tracking(f"sqlite:///{Path(run_dir).absolute()}/mlflow.db", experiment, Path(run_dir) / "mlartifacts", warn)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `[("a.b", 1)]`; lists by index; nothing for None."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return [pair for index, item in enumerate(value) for pair in flatten(item, f"{prefix}.{index}")]
    return [] if value is None else [(prefix, value)]


def _numbers(value: dict[str, Any]) -> list[tuple[str, float]]:
    return [
        (key.replace(".", "/"), float(number))
        for key, number in flatten(value)
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    ]


def _points(row: dict[str, Any]) -> list[Any]:
    """One step's numbers as MLflow points (`learning_rate/vision`); the time from the row where it has one."""
    from mlflow.entities import Metric

    milliseconds = int(row.get("time", time.time()) * 1000)
    numbers = _numbers({key: value for key, value in row.items() if key not in ("step", "time")})
    seconds, waited = row.get("step_seconds"), row.get("data_wait_seconds")
    if seconds and waited is not None:
        numbers.append(("data_wait_share", waited / seconds))
    if MARKER not in dict(numbers):  # a loss that is not finite: the step's place must still be in the store
        numbers.append((MARKER, float("nan")))
    return [Metric(key, value, milliseconds, row["step"]) for key, value in numbers]
